"""The clips that a sweep is measured on.

`find_clips` gives each video a name that is unique in the run, `read_clip` reads one whole, as RGB.
A clip is identified by the SHA-256 of its frames, so moving or renaming a file keeps its records.
"""

import dataclasses
import functools
import hashlib
import itertools
import logging
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from gnvc_jax.files import keyed_name
from gnvc_jax.media.colour import BT709, Colour
from gnvc_jax.media.reader import open_video
from gnvc_jax.media.search import find_videos
from gnvc_jax.media.writer import open_writer

MAX_NAME = 150  # bytes; files are named after a clip and a point

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A source clip.

    Attributes:
        name: Name in files and tables.
        frames: (t, h, w, 3) uint8 RGB.
        fps: Frames per second.
        colour: Colour space of the YUV that the frames become for standard codecs and YUV metrics.
    """

    name: str
    frames: np.ndarray
    fps: Fraction
    colour: Colour = BT709

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of shape, rate and samples: identifies what is coded, not the file."""
        digest = hashlib.sha256(f"{self.frames.shape} {self.fps}".encode())
        digest.update(np.ascontiguousarray(self.frames).data)
        return digest.hexdigest()


def find_clips(paths: Sequence[Path]) -> dict[str, Path]:
    """Finds clips: the given files, and all videos below the given folders.

    A folder of PNG frames is one clip. Clips of the same name are distinguished by the names of
    their folders.

    Returns:
        Paths by name.

    Raises:
        FileNotFoundError: If a path does not exist, or there are no videos.
    """
    found = []
    for path in paths:
        if path.is_dir():
            found += find_videos(path)
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
    if not found:
        raise FileNotFoundError(f"{', '.join(map(str, paths))}: no videos found")
    clips: dict[str, Path] = {}
    # A file may be found twice, by its own name and below a folder or a link.
    for path in dict.fromkeys(p.resolve() for p in found):
        # The name of a folder of frames may hold a dot that begins no suffix.
        name = path.name if path.is_dir() else path.stem
        parents = iter(path.parents)
        # Folder names from the innermost outwards, until the name is new.
        while name in clips and (parent := next(parents, None)):
            name = f"{parent.name}_{name}"
        if len(os.fsencode(name)) > MAX_NAME:
            # Cut and made unique by a hash of the path, since other long names may begin alike.
            name = keyed_name(name, hashlib.sha256(os.fsencode(path)).hexdigest()[:8], MAX_NAME)
        clips[name] = path
    return clips


def read_clip(
    path: Path, name: str = "", frames: int | None = None, full_range: bool = False
) -> Clip:
    """Reads a video; raises MediaError.

    Args:
        path: Path of the video.
        name: Name of the clip; that of the file if empty.
        frames: Maximum number of frames.
        full_range: Whether to read YUV as full-range BT.709, whatever the file says. Standard
            codecs then get the code values of the file.
    """
    colour = Colour(full_range=True) if full_range else None
    with open_video(path, colour=colour) as video:
        pictures = np.stack(list(itertools.islice(video, frames)))
        for note in video.notes:
            log.warning("%s: %s", path, note)
        return Clip(name or path.stem, pictures, video.fps, colour or BT709)


def write_clip(clip: Clip, path: Path) -> None:
    """Writes a lossless .mkv that `read_clip` reads back exactly; raises MediaError."""
    height, width = clip.frames.shape[1:3]
    with open_writer(path, width, height, clip.fps) as writer:
        for frame in clip.frames:
            writer.write(frame)
