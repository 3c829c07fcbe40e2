"""Data sets of videos as shards: few large files in place of many small ones.

`make_shards` packs videos, as they are, into tar files in WebDataset's layout (KEY.mp4 beside
KEY.json), which other programs read as well. A folder of shards holds

    dataset.json       the format, the number of shards, and a digest of the list of videos
    shard-00000.tar    videos in the order of the list
    shard-00000.json   where each video lies in it, checksums and statistics; written last
    manifest.csv       a row for each video, with its licence
    shards.csv         a row for each shard

`read_shards` needs the JSON files alone. A video is then read by its offset, without the rest of
its shard, from a bucket, too; thus clips can be drawn at random from the whole data set.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gnvc_jax.buckets import AnyPath, absolute, as_path, local_copy, make_folder, read_range, stamp
from gnvc_jax.data.left_out import log_left_out, reason
from gnvc_jax.data.video import Video
from gnvc_jax.errors import UsageError
from gnvc_jax.files import atomic_output, write_json, write_whole
from gnvc_jax.media.errors import DamagedVideo, MissingInput
from gnvc_jax.media.reader import probe, read_clip
from gnvc_jax.media.video import Crop

FORMAT = "gnvc-shards/1"
DATASET = "dataset.json"
MIB = 2**20
READERS = 16  # threads that read descriptions of shards
COLUMNS = ("shard", "key", "video", "licence", "frames", "width", "height", "fps", "bytes", "crc32")
SHARD_COLUMNS = ("shard", "videos", "frames", "seconds", "bytes", "sha256", "left_out")


@dataclasses.dataclass(frozen=True)
class ShardVideo(Video):
    """A video in a shard; `path` is SHARD/KEY.SUFFIX, which names it but is no file.

    Attributes:
        shard: Path of the tar file.
        offset, size: Where the video lies in it, in bytes.
        crc32: Checksum of these bytes.
    """

    shard: str = ""
    offset: int = 0
    size: int = 0
    crc32: int = 0

    def read(self, start: int, count: int, crop: Crop) -> np.ndarray:
        """Reads consecutive frames, see `Video.read`.

        Raises:
            DamagedVideo: If the bytes are not those that were packed.
        """
        data = read_range(as_path(self.shard), self.offset, self.size)
        if zlib.crc32(data) != self.crc32:
            raise DamagedVideo(self.path, "its bytes do not match the checksum")
        # Decoders open files by name.
        with tempfile.TemporaryDirectory(prefix="gnvc-clip-") as folder:
            file = Path(folder, f"video{Path(self.path).suffix}")
            file.write_bytes(data)
            return read_clip(file, start, count, crop)


def make_shards(
    videos: Sequence[AnyPath],
    folder: str | os.PathLike,
    licence: str,
    shard_bytes: int = 256 * MIB,
    shard: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> dict[str, str]:
    """Packs videos into shards; shards that are there already are left as they are.

    Videos that cannot be read are left out.

    Args:
        videos: Videos, as `gnvc_jax.data.index.find_videos` finds them.
        folder: Folder of the data set.
        licence: Licence of the videos, for the manifest.
        shard_bytes: Bytes of videos in a shard; a single larger video is a shard of its own.
        shard: Number of this process, and number of processes that share the shards.
        progress: Whether to show a progress bar.

    Returns:
        The videos that were left out, with the reason.

    Raises:
        UsageError: If the folder holds shards of other videos.
        OSError: If the output cannot be written.
    """
    folder = as_path(folder)
    make_folder(folder)
    sizes = [_size(video) for video in videos]
    listed = [[str(absolute(video)), size] for video, size in zip(videos, sizes)]
    # What decides how videos are divided; processes that share the work must agree on it.
    text = json.dumps([listed, shard_bytes, licence])
    groups = _group(videos, sizes, shard_bytes)
    facts = {
        "format": FORMAT,
        "shards": len(groups),
        "digest": hashlib.sha256(os.fsencode(text)).hexdigest(),
    }
    if (folder / DATASET).exists() and _read_json(folder / DATASET) != facts:
        raise UsageError(
            f"{folder}: holds shards of other videos, of another size or licence; use a new folder"
        )
    write_json(folder / DATASET, facts)
    mine = range(len(groups))[shard[0] :: shard[1]]
    for number in tqdm(mine, unit="shard", desc="packing", disable=not progress or None):
        # The description is written last: where it is, the shard is complete.
        if not (folder / f"{_name(number)}.json").exists():
            _write_shard(groups[number], folder, _name(number), licence)
    found = [_read_json(path) for path in sorted(folder.glob("shard-*.json"))]
    _write_tables(folder, found)
    return {row["video"]: row["reason"] for one in found for row in one["left_out"]}


def _name(number: int) -> str:
    """Name of a shard without its suffix."""
    return f"shard-{number:05}"


def _size(video: AnyPath) -> int:
    """Bytes of a video, 0 if it is not there."""
    try:
        return stamp(video)[0]
    except OSError:  # reported when it is opened
        return 0


def _group(
    videos: Sequence[AnyPath], sizes: Sequence[int], limit: int
) -> list[list[tuple[AnyPath, int]]]:
    """Divides videos, in their order, into groups of at most `limit` bytes."""
    # More than the limit, so that the first video opens a group.
    groups, total = [], limit + 1
    for video, size in zip(videos, sizes):
        if total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append((video, size))
        total += size
    return groups


def _write_shard(
    videos: Sequence[tuple[AnyPath, int]], folder: AnyPath, name: str, licence: str
) -> None:
    """Writes a shard, and then its description."""
    records, left_out = [], []
    with atomic_output(folder / f"{name}.tar") as target:
        # USTAR: each member has a header of one block, so offsets are known while writing.
        with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, (video, _) in enumerate(videos):
                try:
                    record = _describe(video, f"{number:06}", licence)
                # Decoders raise errors of many kinds; one bad video must not end the work.
                except Exception as error:
                    left_out.append({"video": str(video), "reason": reason(str(video), error)})
                    log_left_out(str(video), error)
                    continue
                records.append(_add(tar, local_copy(video), record))
        with target.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = target.stat().st_size
    statistics = {
        "shard": f"{name}.tar",
        "videos": len(records),
        "frames": sum(r["frames"] for r in records),
        "seconds": round(sum(r["frames"] / float(Fraction(r["fps"])) for r in records), 3),
        "bytes": size,
        "sha256": digest,
    }
    write_json(folder / f"{name}.json", statistics | {"records": records, "left_out": left_out})


def _describe(video: AnyPath, key: str, licence: str) -> dict[str, Any]:
    """Describes a video by probing it.

    Raises:
        MediaError, OSError: If it cannot be read.
    """
    if not video.is_file():
        raise MissingInput(os.fspath(video), "not a file; only files are packed")
    info = probe(os.fspath(video))
    return {
        "key": f"{key}{video.suffix.lower()}",
        "video": str(video),
        "licence": licence,
        "frames": info.frames,
        "width": info.width,
        "height": info.height,
        "fps": str(info.fps),
    }


def _add(tar: tarfile.TarFile, file: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Adds a video and its description; returns this with the place of the video."""
    member = tarfile.TarInfo(record["key"])
    member.size, crc = file.stat().st_size, 0
    with file.open("rb") as opened:
        # In blocks, since a video may not fit into memory.
        while block := opened.read(MIB):
            crc = zlib.crc32(block, crc)
        opened.seek(0)
        # Behind the header of the member that is about to be added.
        # USTAR puts no other block in between.
        offset = tar.offset + tarfile.BLOCKSIZE
        tar.addfile(member, opened)
    # Names of files may hold bytes that are not UTF-8.
    text = json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace")
    member = tarfile.TarInfo(Path(record["key"]).with_suffix(".json").name)
    member.size = len(text)
    tar.addfile(member, io.BytesIO(text))
    return record | {"offset": offset, "bytes": file.stat().st_size, "crc32": crc}


def _write_tables(folder: AnyPath, shards: Sequence[dict[str, Any]]) -> None:
    """Writes manifest.csv and shards.csv of all shards that are done."""
    videos = [record | {"shard": one["shard"]} for one in shards for record in one["records"]]
    counts = [one | {"left_out": len(one["left_out"])} for one in shards]
    for name, columns, rows in (
        ("manifest.csv", COLUMNS, videos),
        ("shards.csv", SHARD_COLUMNS, counts),
    ):
        text = io.StringIO()
        writer: csv.DictWriter[str] = csv.DictWriter(text, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(folder / name, text.getvalue())


def _read_json(path: AnyPath) -> dict[str, Any]:
    """Reads one of the descriptions.

    Raises:
        UsageError: If it is damaged.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(
            f"{path}: damaged ({error}); remove it and run make-shards again"
        ) from None
    return found


def is_sharded(path: AnyPath) -> bool:
    """Whether a path is a folder of shards."""
    return (path / DATASET).is_file()


def read_shards(folder: AnyPath) -> list[ShardVideo]:
    """Lists the videos of a data set in order; no shard is opened.

    Raises:
        UsageError: If the data set is incomplete or damaged.
    """
    facts = _read_json(folder / DATASET)
    if facts.get("format") != FORMAT:
        raise UsageError(f"{folder / DATASET}: expected format {FORMAT}")
    paths = [folder / f"{_name(number)}.json" for number in range(facts["shards"])]
    # In a bucket each file costs a round trip, so many are under way at once.
    with ThreadPoolExecutor(READERS) as pool:
        there = list(pool.map(lambda path: path.exists(), paths))
        if not all(there):
            raise UsageError(
                f"{folder}: {sum(there)} of {len(there)} shards are there; run make-shards again"
            )
        found = list(pool.map(_read_json, paths))
    return [_video(folder, one["shard"], record) for one in found for record in one["records"]]


def _video(folder: AnyPath, shard: str, record: dict[str, Any]) -> ShardVideo:
    """Makes a `ShardVideo` of its description."""
    return ShardVideo(
        f"{folder / shard}/{record['key']}",
        record["frames"],
        record["width"],
        record["height"],
        Fraction(record["fps"]),
        shard=os.fspath(folder / shard),
        offset=record["offset"],
        size=record["bytes"],
        crc32=record["crc32"],
    )
