"""The demonstration: a clip through the real codec, with a decoder in a process of its own."""

import itertools
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import imageio.v3 as imageio
import numpy as np

from gnvc_jax.evaluation.anchors import AnchorError, Match, match_rate
from gnvc_jax.evaluation.quality import QualityMeter
from gnvc_jax.files import is_same_file
from gnvc_jax.media.errors import UnwritableOutput
from gnvc_jax.media.reader import open_video
from gnvc_jax.media.writer import open_writer
from gnvc_jax.pretrained import load_pretrained

OUTPUTS = ("source.mkv", "decoded.mkv", "refined.mkv", "decoded.mp4", "side_by_side.mp4")
SIDE, FPS = 256, Fraction(25)
COLUMNS = {  # of the table, by field of a record
    "psnr_rgb": "PSNR",
    "ms_ssim_rgb": "MS-SSIM",
    "lpips_alex": "LPIPS",
    "dists": "DISTS",
}


def camera_move(frames: int) -> np.ndarray:
    """Makes a slow pan and zoom over a photograph of matplotlib's, uint8 (frames, 256, 256, 3)."""
    from matplotlib import cbook
    from scipy.ndimage import gaussian_filter, map_coordinates

    photo = imageio.imread(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    h, w, _ = photo.shape
    photo = gaussian_filter(photo.astype(np.float32), (0.7, 0.7, 0))  # against aliasing
    out = []
    for t in np.linspace(0.0, 1.0, frames):
        # Photograph pixels per pixel of the frame, and the corner of the frame in it.
        scale = 1.5 - 0.1 * t
        top, left = (h - scale * SIDE) * (0.2 + 0.1 * t), (w - scale * SIDE) * (0.4 + 0.1 * t)
        rows = top + scale * np.arange(SIDE)[:, None] + np.zeros((1, SIDE))
        columns = left + scale * np.arange(SIDE)[None, :] + np.zeros((SIDE, 1))
        # Linear interpolation, so that motion is smooth below one pixel.
        planes = [map_coordinates(photo[..., c], [rows, columns], order=1) for c in range(3)]
        out.append(np.clip(np.round(np.stack(planes, -1)), 0, 255).astype(np.uint8))
    return np.stack(out)


def read_all(path: Path | str, frames: int | None = None) -> tuple[np.ndarray, Fraction]:
    """Reads the (first) frames of a video, uint8 (t, h, w, 3), and its frame rate."""
    with open_video(str(path)) as video:
        return np.stack(list(itertools.islice(video, frames))), video.fps


def write_all(path: Path, video: np.ndarray, fps: Fraction) -> None:
    """Writes frames (t, h, w, 3) uint8 to a file, whatever was there before."""
    with open_writer(str(path), video.shape[2], video.shape[1], fps, force=True) as out:
        for frame in video:
            out.write(frame)


def gnvc(*args: object) -> float:
    """Runs `gnvc` in a process of its own and returns the seconds it took.

    Raises:
        SystemExit: If it fails, with its code.
    """
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "gnvc_jax.cli", *map(str, args)], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return time.perf_counter() - start


def x265_like(source: np.ndarray, fps: Fraction, size: int) -> Match | None:
    """Codes the clip by x265 (veryslow, low delay) in about as many bytes.

    Args:
        source: Frames, (t, h, w, 3) uint8.
        fps: Frames per second.
        size: Bytes to come close to.

    Returns:
        The coded clip; None, with a message on stderr, where ffmpeg cannot do it.
    """
    try:
        return match_rate("x265", source, fps, size)
    except (AnchorError, OSError) as error:
        print(f"gnvc demo: without x265 beside it ({error})", file=sys.stderr)
        return None


def run(clip: str | None, qp: int, frames: int, model: str, out: Path) -> None:
    """Encodes, decodes, compares; writes stream, videos and a contact sheet to a folder.

    A model with a refiner decodes twice, without and with it. x265 stands beside at the same size,
    where ffmpeg has it.

    Args:
        clip: Video, None for a camera move over a photograph.
        qp: Quality level.
        frames: Frames of the clip to code, from its first one.
        model: Name of a shipped model, model file or run folder.
        out: Folder for everything that is written.

    Raises:
        UnwritableOutput: If the clip is one of the files that would be written.
        SystemExit: If a command fails, with its code.
    """
    for name in OUTPUTS:
        if clip is not None and is_same_file(clip, out / name):
            raise UnwritableOutput(out / name, "is the input; name another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    source, fps = (camera_move(frames), FPS) if clip is None else read_all(clip, frames)
    write_all(out / "source.mkv", source, fps)
    # Encoder and decoders are commands, as a user runs them: nothing but the file passes between.
    stream = out / "clip.gnvc"
    common = "--model", model, "--force"
    seconds = {"encode": gnvc("encode", out / "source.mkv", stream, "--qp", qp, *common)}
    size, (t, h, w, _) = stream.stat().st_size, source.shape
    # With and without refinement, from the same stream.
    steps = {"decoded": 0}
    if trained := load_pretrained(model).steps:
        steps["refined"] = trained
    videos, sizes = {"source": source}, {}
    for name, count in steps.items():
        path = out / f"{name}.mkv"
        seconds[f"decode ({name})"] = gnvc("decode", stream, path, "--steps", count, *common)
        videos[name], _ = read_all(path)
        sizes[f"{name} (--steps {count})"] = size
    write_all(out / "decoded.mp4", videos[name], fps)
    if (match := x265_like(source, fps, size)) is not None:
        videos["x265"] = match.result.frames
        sizes["x265 veryslow" + " (its smallest)" * match.at_floor] = match.result.size

    # A white strip of eight pixels between neighbours, not before the first.
    gap = np.full((*source.shape[:2], 8, 3), 255, np.uint8)
    columns = [part for video in videos.values() for part in (gap, video)][1:]
    write_all(out / "side_by_side.mp4", np.concatenate(columns, axis=2), fps)
    # The contact sheet: four frames in a row, one row for each video.
    picks = np.linspace(0, len(source) - 1, 4).round().astype(int)
    rows = [np.concatenate(list(video[picks]), axis=1) for video in videos.values()]
    imageio.imwrite(out / "contact_sheet.png", np.concatenate(rows, axis=0))

    print(f"\n{t} frames of {w}x{h}, qp {qp}: {size} bytes, {8 * size / (t * h * w):.4f} bpp\n")
    header = "".join(f"{title:>9}" for title in ("bytes", *COLUMNS.values()))
    print(" " * 32 + header)
    meter = QualityMeter(("psnr", "ms_ssim", "lpips_alex", "dists"))
    # The source comes first among the videos and has no quality of its own.
    for (title, count), video in zip(sizes.items(), list(videos.values())[1:]):
        quality = meter(source, video).quality
        values = [quality[field] for field in COLUMNS]
        cells = "".join(f"{'-' if v is None else format(v, 'z.4f'):>9}" for v in values)
        print(f"{title:32}{count:9}{cells}")
    print("\n" + "  ".join(f"{k} {t / s:.2f} frames/s" for k, s in seconds.items()))
    print(f"(whole processes, start and compilation included)\nSee {out}/contact_sheet.png and")
    order = ", ".join(videos)
    print(f"{out}/side_by_side.mp4 ({order}), {out}/decoded.mp4 and {stream}")
