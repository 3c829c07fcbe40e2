"""The videos to train on, and a cache of their decoded frames.

`ClipIndex` finds and probes all videos of a folder or list. With a cache folder it keeps what
probing said of each file (`index.json`) and one array of RGB frames per video, memory-mapped later,
so that a random crop in space and time costs a copy of its bytes. Both are keyed by path, size and
time of modification. An uncompressed frame is about a hundred times as large as a coded one: 10,000
frames of 480x270 take 3.9 GB.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gnvc_jax.buckets import AnyPath, absolute, as_path, is_remote, stamp
from gnvc_jax.data.left_out import LeftOut
from gnvc_jax.data.shards import ShardVideo, is_sharded, read_shards
from gnvc_jax.data.video import Video
from gnvc_jax.errors import UsageError
from gnvc_jax.files import atomic_output, keyed_name, write_json
from gnvc_jax.media import search
from gnvc_jax.media.errors import (
    MissingInput,
    NoFrames,
    TruncatedVideo,
    UnwritableOutput,
    WriteFailed,
    write_error,
)
from gnvc_jax.media.reader import open_video, probe

log = logging.getLogger(__name__)

LIST_SUFFIXES = {".txt", ".list"}


class ClipIndex:
    """The videos at a path: a sequence of Video, sorted by path.

    Args:
        path: A folder, searched with its subfolders for video files and for folders of PNG
            pictures; a list (.txt) with one path per line, relative to the list; one video; or a
            folder made by `gnvc make-shards`. Several such paths come one after another.
        decode_cache: Folder that keeps probing results and all decoded frames; without it every
            clip is decoded when it is drawn. Shards cannot be kept.
        left_out: Account of videos that cannot be read; by default without a limit.

    Attributes:
        videos: All videos.
        counts: Number of videos of each path.

    Raises:
        MissingInput: If there is nothing at the path.
        UsageError: If shards are missing or damaged, or given with a cache.
        NoFrames: If no video of a path is readable.
        TooMuchLeftOut: If too many videos cannot be read.
        UnwritableOutput, WriteFailed, DiskFull: If the cache cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike | Sequence[str],
        decode_cache: str | os.PathLike | None = None,
        left_out: LeftOut | None = None,
    ) -> None:
        paths = [path] if isinstance(path, str | os.PathLike) else list(path)
        self.left_out = LeftOut(limit=1.0) if left_out is None else left_out
        found = [_list(as_path(one)) for one in paths]
        # The number of all videos, since the limit is a share of them.
        self.left_out.start(sum(map(len, found)))
        cache = None if decode_cache is None else as_path(decode_cache)
        parts = [self._look(one, items, cache) for one, items in zip(paths, found)]
        self.videos: tuple[Video, ...] = tuple(video for part in parts for video in part)
        self.counts = tuple(map(len, parts))

    def _look(
        self, path: str | os.PathLike, items: Sequence[AnyPath | ShardVideo], cache: AnyPath | None
    ) -> Sequence[Video]:
        """Looks at the videos of one path."""
        shards = [item for item in items if isinstance(item, ShardVideo)]
        if shards:
            if cache is not None:
                raise UsageError(f"data.decode_cache: does not keep shards such as {path}")
            return shards
        files = [item for item in items if not isinstance(item, ShardVideo)]
        # First what is in each file, then, with a cache, all its frames.
        known = {} if cache is None else _load_known(cache)
        look = functools.partial(_probe, known=known)
        videos = self._in_parallel("looking at videos", look, files)
        if cache is not None:
            _save_known(cache, known | {_key(as_path(v.path)): _record(v) for v in videos})
            videos = self._in_parallel("decoding", functools.partial(_decode, cache=cache), videos)
        if not videos:
            raise NoFrames(path, "no readable video among the training data")
        return videos

    def _in_parallel(
        self, title: str, function: Callable, items: Sequence[AnyPath | Video]
    ) -> list:
        """Applies a function to all items, in order, and leaves out those that cannot be read."""

        def attempt(item: AnyPath | Video) -> Video | Exception:
            try:
                return function(item)
            except (UnwritableOutput, WriteFailed):
                raise  # the fault of the cache, not of the video
            except Exception as error:
                return error

        found = []
        # Threads suffice: PyAV decodes without holding the lock of Python.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            results = tqdm(
                pool.map(attempt, items), desc=title, total=len(items), unit="video", delay=2
            )
            for item, result in zip(items, results):
                if isinstance(result, Exception):
                    # Raises once too many are left out, which ends the work.
                    self.left_out.add(str(getattr(item, "path", item)), result)
                else:
                    found.append(result)
        return found

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, number: int) -> Video:
        return self.videos[number]

    def __iter__(self) -> Iterator[Video]:
        return iter(self.videos)


def _list(path: AnyPath) -> Sequence[AnyPath | ShardVideo]:
    """Lists what is at a path: videos of shards, or files."""
    return read_shards(path) if is_sharded(path) else sorted(set(find_videos(path)))


def find_videos(path: AnyPath) -> Sequence[AnyPath]:
    """Finds the video files and picture folders that `path` is, contains or lists.

    Raises:
        MissingInput: If there is nothing at the path.
    """
    if path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
        lines = map(str.strip, path.read_text(encoding="utf-8").splitlines())
        return [
            as_path(line) if is_remote(line) else path.parent / line
            for line in lines
            if line and not line.startswith("#")
        ]
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise MissingInput(path, "no such file or folder of training videos")
    return search.find_videos(path)


def _key(file: AnyPath) -> str:
    """Key of a file in the cache, which changes when the file does."""
    # Path, size and time of modification in place of a checksum, which would have to read the file.
    size, changed = stamp(file)
    return f"{absolute(file, links=True)}:{size}:{changed}"


def _record(video: Video) -> list:
    """Entry of a video in `index.json`."""
    return [video.frames, video.width, video.height, str(video.fps)]


def _probe(file: AnyPath, known: dict[str, list]) -> Video:
    """Finds the size of a video, from the cache if it is known there."""
    try:
        record = known.get(_key(file))
    except OSError:
        record = None  # probe says what is wrong
    if record is None:
        info = probe(file)
        assert info.frames is not None  # `probe` counts them
        return Video(str(file), info.frames, info.width, info.height, info.fps)
    frames, width, height, fps = record
    return Video(str(file), frames, width, height, Fraction(fps))


def _load_known(cache: AnyPath) -> dict[str, list]:
    try:
        return json.loads((cache / "index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise write_error(cache, error) from None
    except ValueError:
        log.warning("%s: not readable, writing it again", cache / "index.json")
        return {}


def _save_known(cache: AnyPath, known: dict[str, list]) -> None:
    try:
        write_json(cache / "index.json", known)
    except OSError as error:
        raise write_error(cache, error) from None


def _decode(video: Video, cache: AnyPath) -> Video:
    """Returns the video with its array in the cache, which is made on first use."""
    file = as_path(video.path)
    digest = hashlib.sha256(os.fsencode(_key(file))).hexdigest()
    target = cache / f"{keyed_name(file.stem, digest[:16])}.npy"
    if not target.exists():
        try:
            with atomic_output(target) as temporary:
                _write_array(video, temporary)
        except OSError as error:
            raise write_error(target, error) from None
    return dataclasses.replace(video, decoded=str(target))


def _write_array(video: Video, target: Path) -> None:
    """Writes all frames to a .npy file, one by one; a memory map could not report a full disk."""
    # NumPy's own format, so that the array can be memory-mapped afterwards.
    shape = (video.frames, video.height, video.width, 3)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with open_video(video.path) as frames, open(target, "wb") as out:
        np.lib.format.write_array_header_1_0(out, header)
        count = sum(bool(out.write(np.ascontiguousarray(frame).data)) for frame in frames)
    if count != video.frames:
        raise TruncatedVideo(
            video.path, f"probing counted {video.frames} frames, decoding gave {count}"
        )
