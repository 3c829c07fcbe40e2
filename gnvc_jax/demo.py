"""The demonstration: a clip through the real codec, with a decoder in a process of its own."""

import itertools
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import imageio.v3 as imageio
import numpy as np

from gnvc_jax.evaluation.quality import QualityMeter
from gnvc_jax.files import is_same_file
from gnvc_jax.media.errors import UnwritableOutput
from gnvc_jax.media.reader import open_video
from gnvc_jax.media.writer import open_writer
from gnvc_jax.pretrained import load_pretrained

OUTPUTS = ("source.mkv", "decoded.mkv", "refined.mkv", "decoded.mp4", "side_by_side.mp4")
SIDE, FPS = 256, Fraction(25)


def camera_move(frames: int) -> np.ndarray:
    """A slow pan and zoom over a photograph that matplotlib ships: uint8 (frames, 256, 256, 3)."""
    from matplotlib import cbook
    from scipy.ndimage import gaussian_filter, map_coordinates

    photo = imageio.imread(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    h, w, _ = photo.shape
    photo = gaussian_filter(photo.astype(np.float32), (0.7, 0.7, 0))  # against aliasing
    out = []
    for t in np.linspace(0.0, 1.0, frames):
        scale = 1.5 - 0.1 * t
        top, left = (h - scale * SIDE) * (0.2 + 0.1 * t), (w - scale * SIDE) * (0.4 + 0.1 * t)
        rows = top + scale * np.arange(SIDE)[:, None] + np.zeros((1, SIDE))
        columns = left + scale * np.arange(SIDE)[None, :] + np.zeros((SIDE, 1))
        planes = [map_coordinates(photo[..., c], [rows, columns], order=1) for c in range(3)]
        out.append(np.clip(np.round(np.stack(planes, -1)), 0, 255).astype(np.uint8))
    return np.stack(out)


def read_all(path: Path | str, frames: int | None = None) -> tuple[np.ndarray, Fraction]:
    """The (first) frames of a video, uint8 (t, h, w, 3), and its frame rate."""
    with open_video(str(path)) as video:
        return np.stack(list(itertools.islice(video, frames))), video.fps


def write_all(path: Path, video: np.ndarray, fps: Fraction) -> None:
    with open_writer(str(path), video.shape[2], video.shape[1], fps, force=True) as out:
        for frame in video:
            out.write(frame)


def gnvc(*args: object) -> float:
    """Run `gnvc` in a process of its own; seconds. SystemExit with its code if it fails."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "gnvc_jax.cli", *map(str, args)], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return time.perf_counter() - start


def run(clip: str | None, qp: int, frames: int, model: str, out: Path) -> None:
    """Encode, decode, compare; writes stream, videos and a contact sheet to `out`.

    A model with a refiner decodes twice, without and with it.
    """
    for name in OUTPUTS:
        if clip is not None and is_same_file(clip, out / name):
            raise UnwritableOutput(out / name, "is the input; name another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    source, fps = (camera_move(frames), FPS) if clip is None else read_all(clip, frames)
    write_all(out / "source.mkv", source, fps)
    stream = out / "clip.gnvc"
    common = "--model", model, "--force"
    seconds = {"encode": gnvc("encode", out / "source.mkv", stream, "--qp", qp, *common)}
    steps = {"decoded": 0}
    if load_pretrained(model).model.refiner is not None:
        steps["refined"] = 1
    videos = {"source": source}
    for name, count in steps.items():
        path = out / f"{name}.mkv"
        seconds[f"decode ({name})"] = gnvc("decode", stream, path, "--steps", count, *common)
        videos[name], _ = read_all(path)
    write_all(out / "decoded.mp4", videos[name], fps)
    gap = np.full((*source.shape[:2], 8, 3), 255, np.uint8)
    columns = [part for video in videos.values() for part in (gap, video)][1:]
    write_all(out / "side_by_side.mp4", np.concatenate(columns, axis=2), fps)
    picks = np.linspace(0, len(source) - 1, 4).round().astype(int)
    rows = [np.concatenate(list(video[picks]), axis=1) for video in videos.values()]
    imageio.imwrite(out / "contact_sheet.png", np.concatenate(rows, axis=0))

    size, (t, h, w, _) = stream.stat().st_size, source.shape
    print(f"\n{t} frames of {w}x{h}, qp {qp}: {size} bytes, {8 * size / (t * h * w):.4f} bpp")
    meter = QualityMeter(("psnr", "ms_ssim", "lpips_alex"))
    for name in steps:
        quality = meter(source, videos[name]).quality
        values = "  ".join(f"{k} {v:.4f}" for k, v in quality.items() if v is not None)
        print(f"{name} (--steps {steps[name]}): {values}")
    print("  ".join(f"{k} {t / s:.2f} frames/s" for k, s in seconds.items()))
    print(f"(whole processes, start and compilation included)\nSee {out}/contact_sheet.png and")
    order = ", ".join(videos)
    print(f"{out}/side_by_side.mp4 ({order}), {out}/decoded.mp4 and {stream}")
