"""Latents of a data set, computed once and kept in ArrayRecord files.

A frozen VAE costs more than all that stage I trains. The cache folder holds `cache.json`, which
says what the latents are, and for each video an ArrayRecord file with a small JSON file beside it.
A record is one clip from a frame on: the CRC32 of what follows, and a float16 array (t, h, w, c) in
NumPy's format, normalised per channel. Nothing here uses JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from gnvc_jax.data.clips import RandomRead, endless_batches
from gnvc_jax.data.jobs import for_each_video
from gnvc_jax.data.left_out import LeftOut, TooMuchLeftOut
from gnvc_jax.errors import UsageError
from gnvc_jax.files import atomic_output, write_json
from gnvc_jax.media.reader import open_video

HEAD = 4  # bytes of the checksum


@dataclasses.dataclass(frozen=True)
class CacheInfo:
    """What the latents of a cache are; two caches with equal ones can be mixed.

    frames: of the video per record, 1 + 4k; vae: fingerprint of the VAE; mean, std: per channel,
    taken out of the latents; stride: pixels per latent, each way; temporal_stride: frames per
    latent after the first.
    """

    frames: int
    vae: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    stride: int = 8
    temporal_stride: int = 4


def write_latents(
    source: str | Path,
    folder: str | Path,
    info: CacheInfo,
    encode: Callable[[np.ndarray], np.ndarray],
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> dict[str, str]:
    """Fill a cache from the videos at `source`, see `for_each_video`.

    encode: uint8 (frames, h, w, 3), sizes multiples of the stride -> float (t, h', w', c),
    normalised. shard: (number of this process, number of processes), which share the videos. A
    video is cut at the right and below to multiples of twice the stride, and into clips that follow
    each other; a rest is left out. Returns the videos that failed, with the reason.

    Raises MissingInput for the source, UsageError if the folder holds other latents.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, info)

    def work(video: Path, name: str) -> dict:
        with atomic_output(folder / f"{name}.array_record") as target:
            count = _write_video(video, target, info, encode)
        return {"video": str(video), "records": count}

    columns, options = ("video", "records"), {"shard": shard, "progress": progress}
    return for_each_video(source, folder, work, columns, title="latents", **options)


def _write_video(video: Path, target: Path, info: CacheInfo, encode: Callable) -> int:
    """Writes the records of one video to a new file; returns how many."""
    writer, count = ArrayRecordWriter(str(target), "group_size:1"), 0
    with contextlib.closing(writer):
        for clip in _clips(video, info.frames, 2 * info.stride):
            buffer = io.BytesIO()
            np.save(buffer, np.asarray(encode(clip), np.float16))
            data = buffer.getvalue()
            writer.write(zlib.crc32(data).to_bytes(HEAD, "little") + data)
            count += 1
    return count


def _clips(path: Path, frames: int, multiple: int) -> Iterator[np.ndarray]:
    with open_video(str(path)) as video:
        h, w = (size - size % multiple for size in (video.height, video.width))
        clip: list[np.ndarray] = []
        for frame in video:
            clip.append(frame[:h, :w])
            if len(clip) == frames:
                yield np.stack(clip)
                clip = []


def _claim(folder: Path, info: CacheInfo) -> None:
    """Note what the folder holds; UsageError if it holds something else."""
    path = folder / "cache.json"
    if path.exists():
        known = read_info(folder)
        if known != info:
            raise UsageError(f"{folder}: holds other latents: {known}, not {info}")
        return
    write_json(path, dataclasses.asdict(info))


def read_info(folder: str | Path) -> CacheInfo:
    """FileNotFoundError if there is no cache, UsageError if its description is damaged."""
    path = Path(folder) / "cache.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no latents here; gnvc cache-latents makes them")
    try:
        facts = json.loads(path.read_text())
        return CacheInfo(**{k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()})
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: not the description of a cache ({error})") from error


@dataclasses.dataclass(frozen=True)
class RandomLatents(RandomRead):
    """Number of a record -> float32 (t, h, w, c): its first t latents, at a random place."""

    paths: tuple[str, ...]
    records: tuple[int, ...]
    latents: int
    size: tuple[int, int]
    left_out: LeftOut

    def __post_init__(self):
        source = grain.sources.ArrayRecordDataSource(list(self.paths))
        object.__setattr__(self, "_source", source)

    @property
    def count(self) -> int:
        """Records of all files."""
        return sum(self.records)

    def name(self, element: int) -> str:
        return self.paths[int(np.searchsorted(np.cumsum(self.records), element, side="right"))]

    def read(self, element: int, rng: np.random.Generator) -> np.ndarray:
        record = self._source[element]
        if int.from_bytes(record[:HEAD], "little") != zlib.crc32(record[HEAD:]):
            raise UsageError("damaged record")
        latents = np.load(io.BytesIO(record[HEAD:]), allow_pickle=False)[: self.latents]
        if any(s > n for s, n in zip(self.size, latents.shape[1:3])):
            raise UsageError(f"latents of {latents.shape[1:3]}, wanted are crops of {self.size}")
        starts = [int(rng.integers(n - s + 1)) for n, s in zip(latents.shape[1:3], self.size)]
        (top, left), (h, w) = starts, self.size
        return latents[:, top : top + h, left : left + w].astype(np.float32)


def _count_records(path: str, left_out: LeftOut) -> int:
    """Records of a file, 0 if it cannot be opened; the list of them is at its end."""
    try:
        with contextlib.closing(ArrayRecordReader(path)) as reader:
            return reader.num_records()
    except Exception as error:  # the library's, a RuntimeError
        left_out.add(path, error)
        return 0


def latent_dataset(
    folder: str | Path,
    *,
    frames: int,
    size: tuple[int, int],
    batch: int,
    seed: int,
    left_out: LeftOut | None = None,
    **options,
) -> grain.experimental.ElasticIterator:
    """Endless batches float32 (batch, t, h, w, c) of normalised latents from a cache.

    frames, size: as of the clips that the latents stand for, in frames and pixels; left_out:
    collects the files of records that are damaged or too small, in place of which others are drawn;
    the other arguments: see `endless_batches`. Crops start at multiples of the stride. Raises
    FileNotFoundError for an empty cache, UsageError if its clips are shorter, TooMuchLeftOut.
    """
    info, folder = read_info(folder), Path(folder)
    paths = sorted(str(p) for p in folder.glob("*.array_record") if p.with_suffix(".json").exists())
    if not paths:
        raise FileNotFoundError(f"{folder}: no latents here; gnvc cache-latents makes them")
    if frames > info.frames:
        raise UsageError(f"{folder}: its clips have {info.frames} frames, wanted are {frames}")
    size = tuple(side // info.stride for side in size)
    left_out = LeftOut() if left_out is None else left_out
    left_out.start(len(paths))
    records = {path: _count_records(path, left_out) for path in paths}
    records = {path: count for path, count in records.items() if count}
    if not records:
        raise TooMuchLeftOut(f"{folder}: none of {len(paths)} files has a record that can be read")
    latents = 1 + (frames - 1) // info.temporal_stride
    draw = RandomLatents(tuple(records), tuple(records.values()), latents, size, left_out)
    draw.random_map(0, np.random.default_rng(0))  # says now if crops do not fit
    return endless_batches(draw.count, draw, batch=batch, seed=seed, **options)
