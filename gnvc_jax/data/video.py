"""A video to train on: a file, or an array of its decoded frames.

`gnvc_jax.data.index.ClipIndex` makes these, `gnvc_jax.data.clips.RandomClip` reads clips from them.
A `Video` holds paths and sizes only, so it is sent to worker processes at no cost; each process
opens files by itself. `gnvc_jax.data.shards.ShardVideo` is one that lies in a shard.
"""

from __future__ import annotations

import dataclasses
import functools
from fractions import Fraction

import numpy as np

from gnvc_jax.buckets import as_path, is_remote, read_range, stamp
from gnvc_jax.media.reader import read_clip
from gnvc_jax.media.video import Crop


@dataclasses.dataclass(frozen=True)
class Video:
    """A video file or folder of pictures.

    Attributes:
        path: Path of the file or folder.
        frames: Number of frames.
        width, height: Size of a frame in pixels.
        fps: Frames per second.
        decoded: Path of the array of its frames, if there is one.
    """

    path: str
    frames: int
    width: int
    height: int
    fps: Fraction
    decoded: str | None = None

    def read(self, start: int, count: int, crop: Crop) -> np.ndarray:
        """Reads consecutive frames from `start` on, cropped, as uint8 RGB (count, h, w, 3)."""
        if self.decoded is None:
            return read_clip(self.path, start, count, crop)
        top, left, height, width = crop
        if is_remote(self.decoded):
            array = self._download(start, count)
        else:
            array = _mapped(self.decoded)[start : start + count]
        return array[:, top : top + height, left : left + width]

    def _download(self, start: int, count: int) -> np.ndarray:
        """Downloads consecutive decoded frames alone, which cannot be mapped in a bucket."""
        assert self.decoded is not None
        path, frame = as_path(self.decoded), 3 * self.height * self.width
        begin = stamp(path)[0] - (self.frames - start) * frame  # from the end: before is a header
        data = read_range(path, begin, count * frame)
        return np.frombuffer(data, np.uint8).reshape(count, self.height, self.width, 3)


@functools.lru_cache(maxsize=1024)
def _mapped(path: str) -> np.ndarray:
    """Opens an array of frames, once per process."""
    return np.load(path, mmap_mode="r")
