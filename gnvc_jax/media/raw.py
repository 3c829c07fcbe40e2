"""Uncompressed video: .y4m files and pipes, and headerless .yuv files."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import BinaryIO

import numpy as np

from gnvc_jax.media.colour import Colour, yuv_to_rgb
from gnvc_jax.media.errors import (
    BadRawSize,
    EmptyInput,
    NoFrames,
    NotAVideo,
    TruncatedVideo,
    UnsupportedFormat,
)
from gnvc_jax.media.video import (
    DEFAULT_FPS,
    Crop,
    Findings,
    VideoInfo,
    VideoReader,
    pixel_shape_note,
)

_MAX_LINE = 4096  # a y4m header is some tens of bytes
_MAX_SIDE = 1 << 15
_PIX_FMT = re.compile(r"(?:yuv(420|422|444)p|gr[ae]y)(?:(9|10|12|14|16)(?:le)?)?")
_Y4M_CHROMA = re.compile(r"(?:(420)(?:jpeg|mpeg2|paldv)?|(422)|(444)|(mono))(?:p?(9|10|12|14|16))?")
_FACTORS = {"420": (2, 2), "422": (1, 2), "444": (1, 1)}  # rows, columns


@dataclasses.dataclass(frozen=True)
class RawLayout:
    """Size and sample format of planar frames.

    Attributes:
        width: Width in pixels.
        height: Height in pixels.
        chroma: "420", "422", "444" or "mono".
        bit_depth: Bits per sample.
    """

    width: int
    height: int
    chroma: str = "420"
    bit_depth: int = 8

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(rows, columns) of each plane."""
        shapes = [(self.height, self.width)]
        if self.chroma != "mono":
            rows, columns = _FACTORS[self.chroma]
            # Rounded up: odd sides have a last chroma sample of their own.
            shapes += [(-(-self.height // rows), -(-self.width // columns))] * 2
        return shapes

    @property
    def frame_bytes(self) -> int:
        """Bytes of a frame."""
        samples = sum(rows * columns for rows, columns in self.shapes)
        return samples * (1 if self.bit_depth <= 8 else 2)

    def __str__(self) -> str:
        return f"{self.width}x{self.height} {self.chroma} {self.bit_depth}-bit"

    def rgb(self, data: bytes, colour: Colour, crop: Crop | None = None) -> np.ndarray:
        """Converts the bytes of a frame to uint8 RGB (h, w, 3)."""
        # Samples of more than 8 bits take two bytes, little-endian, in files of every kind here.
        samples = np.frombuffer(data, "u1" if self.bit_depth <= 8 else "<u2")
        planes, offset = [], 0
        for rows, columns in self.shapes:
            planes.append(samples[offset : offset + rows * columns].reshape(rows, columns))
            offset += rows * columns
        y, u, v = planes if len(planes) == 3 else (planes[0], None, None)
        return yuv_to_rgb(y, u, v, colour, self.bit_depth, crop)


@dataclasses.dataclass(frozen=True)
class _RawVideo:
    """Location of the frames of a raw file."""

    layout: RawLayout
    fps: Fraction
    colour: Colour
    offsets: range | np.ndarray | None = None  # first byte of each frame; None for a pipe
    pixel_aspect: Fraction | None = None  # width of a pixel over its height

    def info(self, name: str, fps: Fraction | None, colour: Colour | None) -> VideoInfo:
        return VideoInfo(
            name=name,
            width=self.layout.width,
            height=self.layout.height,
            fps=self.fps if fps is None else fps,
            frames=None if self.offsets is None else len(self.offsets),
            colour=colour or self.colour,
            bit_depth=self.layout.bit_depth,
            has_audio=False,
        )

    def positions(self) -> range | np.ndarray:
        """First byte of each frame of a file."""
        if self.offsets is None:
            raise ValueError("a pipe has no positions")
        return self.offsets

    def findings(self) -> Findings:
        found = Findings()
        found.note(pixel_shape_note(self.pixel_aspect))
        return found


# Headerless files


def parse_raw_name(name: str) -> tuple[tuple[int, int] | None, Fraction | None, str]:
    """Reads size, rate and format from a file name such as `a_1920x1080_50_10bit.yuv`.

    The rate is the number before "fps" or "Hz", otherwise a bare number right after the size. The
    depth is that of "10bit" or "10le", otherwise 8. Chroma is 4:2:0 unless the name has 422, 444
    or 400.

    Returns:
        ((width, height) or None, frames per second or None, pixel format).
    """
    stem = os.path.basename(name).rsplit(".", 1)[0]
    size = re.search(r"(?<!\d)(\d+)x(\d+)(?!\d)", stem)
    rate = re.search(r"(?<![\d.])(\d+(?:\.\d+)?)(?:fps|hz)", stem, re.IGNORECASE)
    depth = re.search(r"(?<!\d)(\d+)(?:bit|le(?![a-z]))", stem, re.IGNORECASE)
    chroma = re.search(r"(?:^|[_.\-\s]|p|yuv)(400|420|422|444)(?!\d)", stem, re.IGNORECASE)
    if rate is None and size is not None:
        rate = re.match(
            r"[_.\-\s](?!4(?:00|20|22|44)(?!\d))(\d+(?:\.\d+)?)(?=[_.\-\s]|$)", stem[size.end() :]
        )
    layout = chroma.group(1) if chroma else "420"
    # Names of formats are those of ffmpeg: yuv420p, or yuv420p10le with more than 8 bits.
    suffix = "" if depth is None or int(depth.group(1)) == 8 else f"{depth.group(1)}le"
    return (
        None if size is None else (int(size.group(1)), int(size.group(2))),
        None if rate is None or float(rate.group(1)) == 0 else Fraction(rate.group(1)),
        ("gray" if layout == "400" else f"yuv{layout}p") + suffix,
    )


def _raw_video(path: str, size: tuple[int, int] | None, pix_fmt: str | None) -> _RawVideo:
    named_size, fps, named_format = parse_raw_name(path)
    pix_fmt = pix_fmt or named_format
    size = size or named_size
    if size is None:
        raise BadRawSize(path, "no WIDTHxHEIGHT in the name of the raw file; give the size")
    match = _PIX_FMT.fullmatch(pix_fmt)
    if match is None:
        raise BadRawSize(path, f"raw pixel format {pix_fmt!r} is not supported")
    layout = RawLayout(*size, chroma=match.group(1) or "mono", bit_depth=int(match.group(2) or 8))
    length = os.path.getsize(path)
    if length == 0:
        raise EmptyInput(path, "the file is empty")
    # A size that is wrong rarely divides the length of the file, so this finds most of them.
    if not 0 < min(size) <= max(size) <= _MAX_SIDE or length % layout.frame_bytes:
        raise BadRawSize(
            path,
            f"{length} bytes do not divide by {layout.frame_bytes} bytes per frame of {layout}",
        )
    colour = Colour(full_range=layout.chroma == "mono")
    return _RawVideo(layout, fps or DEFAULT_FPS, colour, range(0, length, layout.frame_bytes))


# YUV4MPEG2


def _y4m_header(file: BinaryIO, name: str) -> _RawVideo:
    line = file.readline(_MAX_LINE)
    if not line:
        raise EmptyInput(name, "the file is empty")
    words = line.decode("ascii", "replace").split()
    if not line.endswith(b"\n") or words[:1] != ["YUV4MPEG2"]:
        raise NotAVideo(name, "does not begin with a YUV4MPEG2 header")
    # Words that begin with X are extensions, and may occur several times.
    tags = {word[0]: word[1:] for word in words[1:] if word[0] != "X"}
    chroma = tags.get("C", "420")
    match = _Y4M_CHROMA.fullmatch(chroma)
    if match is None:
        raise UnsupportedFormat(name, f"y4m chroma format {chroma!r} is not supported")
    layout = next(group for group in match.groups()[:4] if group)
    try:
        width, height = int(tags["W"]), int(tags["H"])
        rate, aspect = (_ratio(tags.get(tag, "0:0")) for tag in "FA")
    except (KeyError, ValueError):
        raise NotAVideo(name, "the YUV4MPEG2 header has no valid size and rate") from None
    if not (0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE):
        raise UnsupportedFormat(name, f"a frame size of {width}x{height} is not supported")
    # ffmpeg writes the range as an extension; grey is full range unless it says otherwise.
    full = "XCOLORRANGE=FULL" in words or (layout == "mono" and "XCOLORRANGE=LIMITED" not in words)
    return _RawVideo(
        layout=RawLayout(width, height, layout, int(match.group(5) or 8)),
        fps=rate or DEFAULT_FPS,
        colour=Colour(full_range=full),
        pixel_aspect=aspect,
    )


def _ratio(text: str) -> Fraction | None:
    """Converts "a:b" to a / b; None if a or b is zero, which means unknown.

    Raises:
        ValueError: If the text has another form.
    """
    over, under = map(int, text.split(":"))
    return Fraction(over, under) if over > 0 and under > 0 else None


def _y4m_frame_start(file: BinaryIO, name: str, number: int) -> bool:
    """Reads a FRAME line; returns False at the end of the file."""
    line = file.readline(_MAX_LINE)
    if not line:
        return False
    if not line.startswith(b"FRAME") or not line.endswith(b"\n"):
        raise NotAVideo(name, f"frame {number} of the y4m stream does not begin with FRAME")
    return True


def _y4m_stream(file: BinaryIO, name: str, layout: RawLayout, colour: Colour) -> Iterator:
    number = 0
    while _y4m_frame_start(file, name, number):
        yield layout.rgb(_read(file, name, layout, number), colour)
        number += 1
    if number == 0:
        raise NoFrames(name, "the y4m stream has no frames")


def _y4m_video(path: str) -> _RawVideo:
    """Reads the header and the frame positions of a file."""
    with open(path, "rb") as file:
        video = _y4m_header(file, path)
        size, step, offsets = os.path.getsize(path), video.layout.frame_bytes, []
        while _y4m_frame_start(file, path, len(offsets)):
            offsets.append(file.tell())
            if file.seek(step, os.SEEK_CUR) > size:
                raise TruncatedVideo(path, f"truncated: ends inside frame {len(offsets) - 1}")
    if not offsets:
        raise NoFrames(path, "the y4m file has no frames")
    return dataclasses.replace(video, offsets=np.array(offsets, np.int64))


# Both


def _read(file: BinaryIO, name: str, layout: RawLayout, number: int) -> bytes:
    data = file.read(layout.frame_bytes)
    if len(data) < layout.frame_bytes:
        raise TruncatedVideo(name, f"truncated: ends inside frame {number}")
    return data


@functools.lru_cache(maxsize=256)
def _video(
    path: str, bytes_: int, mtime_ns: int, size: tuple[int, int] | None, pix_fmt: str | None
) -> _RawVideo:
    del bytes_, mtime_ns  # part of the cache key: a file that changed is read again
    return _y4m_video(path) if path.lower().endswith(".y4m") else _raw_video(path, size, pix_fmt)


def _describe(
    path: str | os.PathLike, size: tuple[int, int] | None = None, pix_fmt: str | None = None
) -> _RawVideo:
    stat = os.stat(path)
    size = None if size is None else (size[0], size[1])  # hashable
    return _video(os.fspath(path), stat.st_size, stat.st_mtime_ns, size, pix_fmt)


def open_raw(
    path: str | os.PathLike,
    size: tuple[int, int] | None = None,
    fps: Fraction | None = None,
    pix_fmt: str | None = None,
    colour: Colour | None = None,
) -> VideoReader:
    """Opens a .y4m or .yuv file for reading; `size` and `pix_fmt` are for .yuv only."""
    video = _describe(path, size, pix_fmt)
    info = video.info(os.fspath(path), fps, colour)
    file = open(path, "rb")

    def frames() -> Iterator[np.ndarray]:
        for number, offset in enumerate(video.positions()):
            file.seek(offset)
            yield video.layout.rgb(_read(file, info.name, video.layout, number), info.colour)

    return VideoReader(info, frames(), file.close, video.findings())


def open_y4m_pipe(
    file: BinaryIO, name: str = "-", fps: Fraction | None = None, colour: Colour | None = None
) -> VideoReader:
    """Reads a y4m stream that cannot seek, of unknown length; the stream is left open."""
    video = _y4m_header(file, name)
    info = video.info(name, fps, colour)
    frames = _y4m_stream(file, name, video.layout, info.colour)
    return VideoReader(info, frames, lambda: None, video.findings())


def read_raw_clip(
    path: str | os.PathLike,
    start: int,
    count: int,
    crop: Crop | None = None,
    size: tuple[int, int] | None = None,
    pix_fmt: str | None = None,
) -> np.ndarray:
    """Reads frames start .. start + count - 1 as uint8 RGB (count, h, w, 3)."""
    video, name = _describe(path, size, pix_fmt), os.fspath(path)
    offsets = video.positions()[start : start + count]
    if len(offsets) < count:
        raise TruncatedVideo(
            name, f"frames {start} to {start + count - 1} asked for, {len(offsets)} of them found"
        )
    out = []
    with open(path, "rb") as file:
        for number, offset in enumerate(offsets, start):
            file.seek(offset)
            data = _read(file, name, video.layout, number)
            out.append(video.layout.rgb(data, video.colour, crop))
    return np.stack(out)
