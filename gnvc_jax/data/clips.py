"""Random clips from a folder of videos, as a Grain pipeline.

Every video is decoded once into a memory-mapped array of RGB frames in a cache folder, so that a
random crop in space and time costs a copy. An element is a pure function of (seed, index): the
number of workers, resuming, and the number of processes change nothing but who computes it.
"""

import hashlib
import logging
import os
from pathlib import Path

import av
import grain
import numpy as np
from tqdm import tqdm

from gnvc_jax.media.colour import Colour, yuv_to_rgb
from gnvc_jax.runtime import cache_folder

log = logging.getLogger(__name__)
SUFFIXES = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".gif"}


class ClipIndex:
    """The videos below a folder (or one file), each as a decoded array on disk.

    Raises FileNotFoundError if nothing is there, ValueError if no video can be read. A video that
    cannot be read is logged and left out.
    """

    def __init__(self, path: str | Path, cache: str | Path | None = None):
        root = Path(path)
        if not root.exists():
            raise FileNotFoundError(f"{path}: no such file or folder of training videos")
        files = [root] if root.is_file() else sorted(root.rglob("*"))
        files = [f for f in files if f.suffix.lower() in SUFFIXES]
        folder = Path(cache or cache_folder() / "frames")
        folder.mkdir(parents=True, exist_ok=True)
        self.arrays: list[Path] = []
        self.shapes: list[tuple[int, ...]] = []
        for file in tqdm(files, desc="decoding", unit="video", delay=2):
            try:
                array = cached_frames(file, folder)
            except (av.FFmpegError, ValueError) as error:
                log.warning("%s: left out (%s)", file, error)
                continue
            self.arrays.append(array)
            self.shapes.append(np.load(array, mmap_mode="r").shape)
        if not self.arrays:
            raise ValueError(f"{path}: no readable video")


def cached_frames(file: Path, folder: Path) -> Path:
    """The .npy of a video's RGB frames uint8 (t, h, w, 3), decoded on first use."""
    stat = file.stat()
    key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    target = folder / f"{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    if not target.exists():
        with av.open(str(file)) as container:
            frames = [_rgb(frame) for frame in container.decode(video=0)]
        if not frames:
            raise ValueError("no frames")
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        with open(temporary, "wb") as out:
            np.save(out, np.stack(frames))
        os.replace(temporary, target)
    return target


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    if frame.format.name not in ("yuv420p", "yuvj420p"):
        return frame.to_ndarray(format="rgb24")
    h, w = frame.height, frame.width
    sizes = ((h, w), ((h + 1) // 2, (w + 1) // 2), ((h + 1) // 2, (w + 1) // 2))
    planes = [
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:rows, :columns]
        for plane, (rows, columns) in zip(frame.planes, sizes, strict=True)
    ]
    full = frame.format.name == "yuvj420p" or frame.color_range == 2
    matrix = "bt601" if frame.colorspace in (5, 6) else "bt709"
    return yuv_to_rgb(*planes, Colour(matrix, full), 8)


class RandomClip(grain.transforms.RandomMap):
    """Video number -> random crop uint8 (frames, h, w, 3)."""

    def __init__(self, index: ClipIndex, frames: int, size: tuple[int, int], downscale_prob: float):
        self.arrays, self.frames, self.size = index.arrays, frames, size
        self.downscale_prob = downscale_prob

    def random_map(self, element: int, rng: np.random.Generator) -> np.ndarray:
        video = np.load(self.arrays[element], mmap_mode="r")
        scale = 2 if rng.random() < self.downscale_prob else 1
        if min(video.shape[1] // self.size[0], video.shape[2] // self.size[1]) < scale:
            scale = 1
        h, w = (min(scale * s, full) for s, full in zip(self.size, video.shape[1:3], strict=True))
        t0, y0, x0 = (
            int(rng.integers(0, full - part + 1))
            for full, part in zip(video.shape[:3], (self.frames, h, w), strict=True)
        )
        clip = np.asarray(video[t0 : t0 + self.frames, y0 : y0 + h, x0 : x0 + w])
        if scale == 2:
            pairs = clip.reshape(self.frames, h // 2, 2, w // 2, 2, 3).astype(np.uint16)
            clip = ((pairs.sum(axis=(2, 4)) + 2) // 4).astype(np.uint8)
        if rng.random() < 0.5:
            clip = clip[:, :, ::-1]
        pad = [(0, max(0, s - n)) for s, n in zip(self.size, clip.shape[1:3], strict=True)]
        return np.ascontiguousarray(np.pad(clip, ((0, 0), *pad, (0, 0)), mode="edge"))


def clip_dataset(
    index: ClipIndex,
    *,
    frames: int,
    size: tuple[int, int],
    batch: int,
    seed: int,
    num_workers: int = 0,
    downscale_prob: float = 0.5,
    shard: tuple[int, int] = (0, 1),
) -> grain.IterDataset:
    """Endless batches uint8 (batch, frames, h, w, 3) of random clips.

    A video is drawn in proportion to its number of frames; with `downscale_prob` the crop is taken
    twice as large and halved by a 2x2 mean; half of the crops are mirrored; a video smaller than
    the crop is padded by its edge. shard: (number of this process, number of processes).
    The iterator's get_state / set_state resume with exactly the next batch.
    """
    long_enough = [i for i, shape in enumerate(index.shapes) if shape[0] >= frames]
    if not long_enough:
        raise ValueError(f"no training video has {frames} frames")
    numbers = [i for i in long_enough for _ in range(max(1, index.shapes[i][0] // 16))]
    data = (
        grain.MapDataset.source(numbers)
        .seed(seed)
        .shuffle()
        .repeat()[shard[0] :: shard[1]]
        .random_map(RandomClip(index, frames, size, downscale_prob))
        .batch(batch)
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    )
    if num_workers:
        data = data.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(num_workers))
    return data
