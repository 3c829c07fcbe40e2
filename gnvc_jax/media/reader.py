"""Reading videos: `open_video` to stream, `read_clip` for random access, `probe` to describe.

Sources: whatever PyAV reads (mp4, mkv, webm, avi, gif, ...), .y4m, headerless .yuv, a folder of PNG
pictures, and '-' for y4m on standard input. Files may be in buckets. Frames are returned exactly,
one for one, in display order. A variable frame rate is never resampled; the mean is reported.
Rotation and mirroring stored in the file are applied; sample aspect ratio, interlacing, alpha and
audio are ignored. `VideoReader.notes` lists what was ignored or decided.

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

from gnvc_jax.buckets import is_remote, local_copy
from gnvc_jax.media import container, folder, raw
from gnvc_jax.media.colour import Colour
from gnvc_jax.media.errors import EmptyInput, MissingInput, read_error
from gnvc_jax.media.video import Crop, VideoInfo, VideoReader

__all__ = ["VideoInfo", "VideoReader", "open_video", "probe", "read_clip"]

RAW_SUFFIXES = (".y4m", ".yuv")


def _on_disk(path: str | os.PathLike) -> str | os.PathLike:
    """Path of a local copy of a video in a bucket, otherwise the path as it is."""
    try:
        return local_copy(path) if is_remote(path) else path
    except OSError as error:
        raise read_error(path, error) from None


def _kind(path: str | os.PathLike) -> str:
    """'folder', 'raw' or 'container', after the checks that hold for all of them."""
    try:
        if os.path.isdir(path):
            # Fails here, with a clear message, if the folder may not be read.
            os.listdir(path)
            return "folder"
        if os.path.isfile(path):
            with open(path, "rb") as file:
                # Decoders would call an empty file damaged or of an unknown format.
                if not file.read(1):
                    raise EmptyInput(path, "the file is empty")
        else:
            # Raises what is wrong with the path; pipes and devices pass, and are left to FFmpeg.
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
    """Opens a video for reading.

    Args:
        path: Path of the video, or "-" for y4m on standard input.
        size: (width, height) of a headerless .yuv file; if None, as its name says (see
            `raw.parse_raw_name`). Other sources ignore it.
        fps: Frame rate that overrides that of the source; sources without one have 25.
        pix_fmt: Pixel format of a headerless .yuv file: "yuv420p", "yuv422p10le", "gray", and so
            on. Other sources ignore it.
        colour: Colour space that overrides that of the source; ignored for RGB sources.
        stream: Index of the video stream of a container; if None, the one that is flagged as
            default, or else the largest.
        tolerant: Whether to read as much as can be decoded of a damaged or truncated container,
            with a note, instead of raising DamagedVideo or TruncatedVideo.

    Raises:
        MediaError: If the video cannot be read.
        ValueError: If the rate is not positive.
    """
    if fps is not None:
        # A float such as 29.97 is meant as 2997/100, not as its 52 binary digits.
        fps = Fraction(fps).limit_denominator(1_000_000)
        if fps <= 0:
            raise ValueError(f"the frame rate must be positive, got {fps}")
    if os.fspath(path) == "-":
        return raw.open_y4m_pipe(sys.stdin.buffer, "-", fps, colour)
    path = _on_disk(path)
    kind = _kind(path)
    if kind == "folder":
        return folder.open_folder(path, fps)
    if kind == "raw":
        return raw.open_raw(path, size, fps, pix_fmt, colour)
    return container.open_container(path, fps, colour, stream, tolerant)


def read_clip(
    path: str | os.PathLike, start: int, count: int, crop: Crop | None = None
) -> np.ndarray:
    """Reads some frames; they equal those that iterating returns.

    Decoding of a compressed file starts at the key frame before `start`, or at the beginning if its
    time stamps do not allow this.

    Args:
        path: Path of the video.
        start: Index of the first frame.
        count: Number of frames.
        crop: (top, left, height, width) in pixels of the shown frame; only this part is converted.

    Returns:
        uint8 RGB (count, h, w, 3).

    Raises:
        MediaError: If the video cannot be read.
        TruncatedVideo: If it has fewer frames.
        ValueError: If the crop reaches outside of the picture.
    """
    if start < 0 or count < 1:
        raise ValueError(f"cannot read {count} frames from frame {start}")
    path = _on_disk(path)
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
    """Describes a video as `open_video` would open it, with its true number of frames.

    If a container has no index of its frames, the whole file is read, but not decoded.

    Args:
        path: Path of the video.
        size: See `open_video`.
        fps: See `open_video`.
        pix_fmt: See `open_video`.
        colour: See `open_video`.
        stream: See `open_video`.

    Raises:
        MediaError: If the video cannot be read; MissingInput for "-", which can be read only once.
    """
    if os.fspath(path) == "-":
        raise MissingInput(path, "standard input cannot be read twice")
    path = _on_disk(path)
    with open_video(
        path, size=size, fps=fps, pix_fmt=pix_fmt, colour=colour, stream=stream
    ) as video:
        info = video.info
    if _kind(path) != "container":
        return info
    # The number in the header of a container is often an estimate, or missing.
    return dataclasses.replace(info, frames=container.count_frames(path, stream))
