"""Latents of a data set, computed once and kept in ArrayRecord files.

Encoding with a frozen VAE costs more than training a codec on its latents, and coding with a frozen
codec more than training a refiner. `write_latents` fills a cache folder, `latent_dataset` reads it
for training. The folder holds `cache.json`, which describes the latents, and for each video an
ArrayRecord file with a small JSON file beside it. A record is one clip: the CRC32 of what follows,
and in NumPy's format either a float16 array (t, h, w, c), normalised per channel, or what a codec
made of the clip, see `CODED`. Nothing here uses JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from gnvc_jax.buckets import AnyPath, as_path, is_remote, local_copy, make_folder, stamp
from gnvc_jax.data.clips import RandomRead, endless_batches
from gnvc_jax.data.jobs import for_each_video
from gnvc_jax.data.left_out import LeftOut, TooMuchLeftOut
from gnvc_jax.errors import UsageError
from gnvc_jax.files import atomic_output, write_json
from gnvc_jax.media.reader import open_video

HEAD = 4  # bytes of the checksum

# Arrays of a clip that a codec coded, and their types: normalised latents of the source, decoded
# ones and features of the codec, (t, h, w, c) each; the quality level of each latent, (t,); frames
# of the source and decoded ones, (frames, H, W, 3).
CODED = {
    "latents": np.float16,
    "decoded": np.float16,
    "features": np.float16,
    "levels": np.int32,
    "video": np.uint8,
    "frames": np.uint8,
}


@dataclasses.dataclass(frozen=True)
class CacheInfo:
    """Description of the latents in a cache; caches with equal descriptions can be mixed.

    Attributes:
        frames: Number of frames of video in one record, 1 + 4k.
        vae: Fingerprint of the VAE.
        mean, std: Statistics of each channel, by which the latents are normalised.
        stride: Pixels per latent in each direction.
        temporal_stride: Frames per latent after the first.
        codec: Fingerprint of the codec that coded the clips; None for latents of the source alone.
    """

    frames: int
    vae: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    stride: int = 8
    temporal_stride: int = 4
    codec: str | None = None


def write_latents(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    info: CacheInfo,
    encode: Callable[[np.ndarray], np.ndarray | list[dict[str, np.ndarray]]],
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> dict[str, str]:
    """Fills a cache from the videos at `source`.

    A video is cropped at the right and below to multiples of twice the stride, and divided into
    consecutive clips; what is left at the end is dropped.

    Args:
        source: Folder, list or video, see `for_each_video`.
        folder: Folder of the cache, which may hold latents of the same description.
        info: Description of the latents.
        encode: Function from uint8 (frames, h, w, 3) to normalised latents, float (t, h2, w2, c),
            or to the arrays of `CODED` for some parts of the clip, each of which becomes a record.
        shard: Number of this process, and number of processes that share the videos.
        progress: Whether to show a progress bar.

    Returns:
        The videos that failed, with the reason.

    Raises:
        MissingInput: If there is nothing at the source.
        UsageError: If the folder holds other latents.
    """
    folder = as_path(folder)
    make_folder(folder)
    _claim(folder, info)

    def work(video: AnyPath, name: str) -> dict:
        with atomic_output(folder / f"{name}.array_record") as target:
            count = _write_video(video, target, info, encode)
        return {"video": str(video), "records": count}

    # The description of the latents is in cache.json, so rows need no settings of their own.
    columns, options = ("video", "records"), {"shard": shard, "progress": progress}
    return for_each_video(source, folder, work, columns, title="latents", **options)


def _write_video(video: AnyPath, target: Path, info: CacheInfo, encode: Callable) -> int:
    """Writes the records of one video to a new file, and returns their number."""
    # Groups of one record: random access then reads no other record.
    writer, count = ArrayRecordWriter(str(target), "group_size:1"), 0
    with contextlib.closing(writer):
        for clip in _clips(video, info.frames, 2 * info.stride):
            found = encode(clip)
            for record in [found] if isinstance(found, np.ndarray) else found:
                data = _pack(record)
                writer.write(zlib.crc32(data).to_bytes(HEAD, "little") + data)
                count += 1
    return count


def _pack(record: np.ndarray | dict[str, np.ndarray]) -> bytes:
    """Latents, or the arrays of `CODED`, in NumPy's format."""
    buffer = io.BytesIO()
    if isinstance(record, dict):
        typed = {name: np.asarray(x, CODED[name]) for name, x in record.items()}
        np.savez(buffer, allow_pickle=False, **typed)
    else:
        # Half the size of float32. Normalised latents are around 1, where float16 has 11 bits.
        np.save(buffer, np.asarray(record, np.float16))
    return buffer.getvalue()


def _clips(path: AnyPath, frames: int, multiple: int) -> Iterator[np.ndarray]:
    """Yields consecutive clips of a video, cropped to multiples of `multiple` pixels."""
    with open_video(str(path)) as video:
        # Whole tokens of the refiner, which are 2x2 latents.
        h, w = (size - size % multiple for size in (video.height, video.width))
        clip: list[np.ndarray] = []
        for frame in video:
            clip.append(frame[:h, :w])
            if len(clip) == frames:
                yield np.stack(clip)
                clip = []


def _claim(folder: AnyPath, info: CacheInfo) -> None:
    """Writes the description of the cache.

    Raises:
        UsageError: If the folder holds other latents.
    """
    path = folder / "cache.json"
    if path.exists():
        known = read_info(folder)
        if known != info:
            raise UsageError(
                f"{folder}: the cache holds other latents: expected {info}, found {known}"
            )
        return
    write_json(path, dataclasses.asdict(info))


def read_info(folder: str | os.PathLike) -> CacheInfo:
    """Reads the description of a cache.

    Raises:
        FileNotFoundError: If there is no cache.
        UsageError: If its description is damaged.
    """
    path = as_path(folder) / "cache.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no latents found; create them with gnvc cache-latents")
    try:
        facts = json.loads(path.read_text())
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()
        }
        return CacheInfo(**fields)
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: not the description of a cache ({error})") from error


@dataclasses.dataclass(frozen=True)
class RandomLatents(RandomRead):
    """Draws a random crop, float32 (t, h, w, c), of the first t latents of a record.

    Of what a codec coded, it draws the same part of all arrays of `CODED`.

    Attributes:
        paths: Paths of the ArrayRecord files.
        records: Number of records in each file.
        latents: Number t of latents to take.
        size: Height and width of the crop, in latents.
        left_out: Account of data that could not be read.
        strides: Frames and pixels per latent, where there are frames.
    """

    paths: tuple[str, ...]
    records: tuple[int, ...]
    latents: int
    size: tuple[int, int]
    left_out: LeftOut
    strides: tuple[int, int] = (4, 8)
    _copies: dict[str, Path] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def count(self) -> int:
        """Number of records in all files."""
        return sum(self.records)

    def locate(self, element: int) -> tuple[str, int]:
        """Finds the file that a record is in, and its number there."""
        # Records are numbered through all files: a cumulated count is the first number of the next.
        ends = np.cumsum(self.records)
        number = int(np.searchsorted(ends, element, side="right"))
        return self.paths[number], element - int(ends[number] - self.records[number])

    def name(self, element: int) -> str:
        """Path of the file that a record is in."""
        return self.locate(element)[0]

    def copy(self, path: str) -> Path:
        """Path of a file on the local disk; it is downloaded on first use, and again if gone."""
        copy = self._copies.get(path)
        if copy is None or not copy.exists():
            copy = self._copies[path] = local_copy(path)
        return copy

    def read(self, element: int, rng: np.random.Generator) -> Any:
        """Reads a random crop of a record.

        Raises:
            UsageError: If the record is damaged or too small.
        """
        path, number = self.locate(element)
        file = self.copy(path)
        (record,) = _reader(str(file), stamp(file)).read([number])
        if int.from_bytes(record[:HEAD], "little") != zlib.crc32(record[HEAD:]):
            raise UsageError("damaged record")
        found = np.load(io.BytesIO(record[HEAD:]), allow_pickle=False)
        arrays = {"latents": found} if isinstance(found, np.ndarray) else dict(found)
        shape = arrays["latents"].shape[1:3]
        if any(s > n for s, n in zip(self.size, shape)):
            raise UsageError(f"latents of {shape} are too small for crops of {self.size}")
        starts = [int(rng.integers(n - s + 1)) for n, s in zip(shape, self.size)]
        cropped = {name: self.crop(x, *starts) for name, x in arrays.items()}
        return cropped["latents"] if isinstance(found, np.ndarray) else cropped

    def crop(self, x: np.ndarray, top: int, left: int) -> np.ndarray:
        """Crops an array of latents, of frames or of levels; `top` and `left` are in latents."""
        # The first latents of a record, since only its first latent stands for a single frame.
        if x.ndim == 1:
            return x[: self.latents]
        (h, w), (frames, pixels) = self.size, self.strides
        if x.dtype != np.uint8:
            return x[: self.latents, top : top + h, left : left + w].astype(np.float32)
        rows, columns = (slice(pixels * a, pixels * (a + n)) for a, n in ((top, h), (left, w)))
        return x[: 1 + frames * (self.latents - 1), rows, columns]


@functools.lru_cache(maxsize=256)  # open files
def _reader(path: str, stamp: tuple) -> ArrayRecordReader:
    """Opens a file once per process, and again after it has changed."""
    return ArrayRecordReader(path)


def _count_records(path: str, left_out: LeftOut) -> int:
    """Counts the records in a file; 0 if it cannot be opened, as when its end is missing.

    Files in a bucket are not downloaded for it: their rows of the manifest say the number.
    """
    try:
        if is_remote(path):
            return json.loads(as_path(path).with_suffix(".json").read_text())["records"]
        with contextlib.closing(ArrayRecordReader(path)) as reader:
            return reader.num_records()
    except Exception as error:  # a RuntimeError of the library
        left_out.add(path, error)
        return 0


def latent_dataset(
    folder: str | os.PathLike,
    *,
    frames: int,
    size: tuple[int, int],
    batch: int,
    seed: int,
    left_out: LeftOut | None = None,
    **options: Any,
) -> grain.experimental.ElasticIterator:
    """Makes endless batches of normalised latents from a cache, float32 (batch, t, h, w, c).

    Batches of what a codec coded are dictionaries with the names of `CODED`; float16 becomes
    float32.

    Args:
        folder: Folder of the cache.
        frames, size: Size of the clips that the latents stand for, in frames and pixels.
        batch: Number of clips in a batch of one process.
        seed: Seed of all random draws.
        left_out: Account of records that are damaged or too small, in place of which others are
            drawn.
        **options: Options of `endless_batches`.

    Raises:
        FileNotFoundError: If the cache is empty.
        UsageError: If the clips in the cache are shorter.
        TooMuchLeftOut: If too much of it cannot be read; the iterator may raise it, too.
    """
    info, folder = read_info(folder), as_path(folder)
    # The JSON file is written last, so an array without one is not complete.
    paths = sorted(str(p) for p in folder.glob("*.array_record") if p.with_suffix(".json").exists())
    if not paths:
        command = "cache-latents" if info.codec is None else "cache-coded"
        raise FileNotFoundError(f"{folder}: no latents found; create them with gnvc {command}")
    if frames > info.frames:
        raise UsageError(
            f"{folder}: expected clips of at least {frames} frames, found {info.frames}"
        )
    # From pixels to latents.
    size = size[0] // info.stride, size[1] // info.stride
    left_out = LeftOut() if left_out is None else left_out
    left_out.start(len(paths))
    records = {path: _count_records(path, left_out) for path in paths}
    records = {path: count for path, count in records.items() if count}
    if not records:
        raise TooMuchLeftOut(f"{folder}: none of {len(paths)} files has a readable record")
    latents = 1 + (frames - 1) // info.temporal_stride
    strides = info.temporal_stride, info.stride
    draw = RandomLatents(tuple(records), tuple(records.values()), latents, size, left_out, strides)
    # Draws once, which fails now, rather than in a worker later, if crops do not fit.
    draw.random_map(0, np.random.default_rng(0))
    return endless_batches(draw.count, draw, batch=batch, seed=seed, **options)
