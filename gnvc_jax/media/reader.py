"""Reading videos: `open_video` to stream, `read_clip` for random access, `probe` to describe.

Sources: whatever PyAV reads (mp4, mkv, webm, avi, gif, ...), .y4m, headerless .yuv, a folder of PNG
pictures, and '-' for y4m on standard input. Frames come out one for one, exactly and in order of
display; a variable frame rate is passed through, never resampled, at its mean. Rotation
and mirroring stored in the file are applied; sample aspect ratio, interlacing, alpha and sound are
ignored. `VideoReader.notes` says what was ignored or decided.

Colour follows `gnvc_jax.media.colour`: BT.709 limited range unless tagged or told otherwise, full
range for grey; YUV tagged as RGB has the matrix of its size. RGB sources are passed through. Errors
are those of `gnvc_jax.media.errors`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from fractions import Fraction

import numpy as np

from gnvc_jax.media import container, folder, raw
from gnvc_jax.media.colour import Colour
from gnvc_jax.media.errors import EmptyInput, MissingInput, read_error
from gnvc_jax.media.video import Crop, VideoInfo, VideoReader

__all__ = ["VideoInfo", "VideoReader", "open_video", "probe", "read_clip"]

RAW_SUFFIXES = (".y4m", ".yuv")


def _kind(path: str | os.PathLike) -> str:
    """'folder', 'raw' or 'container', after the checks that hold for all of them."""
    try:
        if os.path.isdir(path):
            os.listdir(path)
            return "folder"
        if os.path.isfile(path):
            with open(path, "rb") as file:
                if not file.read(1):
                    raise EmptyInput(path, "the file is empty")
        else:
            os.stat(path)
    except OSError as error:
        raise read_error(path, error) from None
    return "raw" if os.fspath(path).lower().endswith(RAW_SUFFIXES) else "container"


def open_video(
    path: str | os.PathLike,
    *,
    size: tuple[int, int] | None = None,
    fps: Fraction | float | None = None,
    pix_fmt: str | None = None,
    colour: Colour | None = None,
    stream: int | None = None,
    tolerant: bool = False,
) -> VideoReader:
    """A VideoReader of `path`.

    size: (width, height) and pix_fmt: 'yuv420p', 'yuv422p10le', 'gray', ... of a headerless .yuv
    file, otherwise taken from its name (see `raw.parse_raw_name`); other sources ignore them. fps
    and colour replace what the source says; colour has no effect on RGB sources. Without a rate
    it is 25. stream: number of the video stream of a container, counted from 0; by default the one
    flagged as default, else the largest. tolerant: read what can be decoded of a damaged or
    truncated container and say so in `notes`, instead of DamagedVideo and TruncatedVideo. Raises
    MediaError, ValueError for a rate that is not positive.
    """
    if fps is not None:
        fps = Fraction(fps).limit_denominator(1_000_000)
        if fps <= 0:
            raise ValueError(f"the frame rate must be positive, got {fps}")
    if os.fspath(path) == "-":
        return raw.open_y4m_pipe(sys.stdin.buffer, "-", fps, colour)
    kind = _kind(path)
    if kind == "folder":
        return folder.open_folder(path, fps)
    if kind == "raw":
        return raw.open_raw(path, size, fps, pix_fmt, colour)
    return container.open_container(path, fps, colour, stream, tolerant)


def read_clip(
    path: str | os.PathLike, start: int, count: int, crop: Crop | None = None
) -> np.ndarray:
    """Frames start .. start + count - 1 as uint8 RGB (count, h, w, 3), the same as iterating gives.

    crop: (top, left, height, width) in pixels of the shown frame; only that part is converted. A
    compressed file is entered at the key frame before `start`; if its time stamps do not allow
    this, it is decoded from the beginning. Raises MediaError, TruncatedVideo if the frames are not
    there, ValueError for a crop outside the picture.
    """
    if start < 0 or count < 1:
        raise ValueError(f"cannot read {count} frames from frame {start}")
    kind = _kind(path)
    if kind == "folder":
        return folder.read_folder_clip(path, start, count, crop)
    if kind == "raw":
        return raw.read_raw_clip(path, start, count, crop)
    return container.read_container_clip(path, start, count, crop)


def probe(
    path: str | os.PathLike,
    *,
    size: tuple[int, int] | None = None,
    fps: Fraction | float | None = None,
    pix_fmt: str | None = None,
    colour: Colour | None = None,
    stream: int | None = None,
) -> VideoInfo:
    """Describe a file or folder as `open_video` would see it, with its true number of frames.

    Where the container has no list of its frames the whole file is read, but not decoded. Raises
    MediaError; MissingInput for '-', which can be read only once.
    """
    if os.fspath(path) == "-":
        raise MissingInput(path, "standard input cannot be read twice")
    with open_video(
        path, size=size, fps=fps, pix_fmt=pix_fmt, colour=colour, stream=stream
    ) as video:
        info = video.info
    if _kind(path) != "container":
        return info
    return dataclasses.replace(info, frames=container.count_frames(path, stream))
