"""Writing videos: `open_writer` for files, folders of images and pipes.

========  ====================================================================================
.mp4      H.264 4:2:0, constant rate factor 12: plays everywhere, nearly lossless. Odd sides
          are padded by one replicated row or column, since such a stream has even sizes.
.mkv      FFV1 in RGB: lossless. Primaries and transfer characteristics are tagged.
.y4m      8-bit 4:2:0 (or 4:4:4), uncompressed; BT.709, since the format cannot name a matrix.
``-``     the same on standard output.
a folder  000001.png, 000002.png, ...: lossless. A folder is a name that ends with a slash or
          has no suffix, or a folder that exists.
========  ====================================================================================

The output is written under a temporary name and renamed when it is complete. A failure leaves
nothing behind, and an existing output unchanged. Audio goes into .mp4 and .mkv.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, Protocol

import av
import numpy as np
from av.video.plane import VideoPlane
from PIL import Image

from gnvc_jax.files import atomic_output, temporary_path, would_overwrite
from gnvc_jax.media.audio import AudioMuxer, AudioTrack
from gnvc_jax.media.colour import BT709, Colour, rgb_to_yuv420, rgb_to_yuv444
from gnvc_jax.media.errors import OutputExists, UnwritableOutput, WriteFailed, write_error

SUFFIXES = (".mp4", ".mkv", ".y4m")
_FRAME_NAME = re.compile(r"\d{6,}\.png")
_MP4 = {"crf": "12", "preset": "medium", "x264-params": "chromaloc=1"}  # chroma in the middle
TAGLESS_NOTE = "this output has no tags for HDR or wide gamut; players will show wrong colours"
SILENT_NOTE = "the audio was left out: this output has no place for it; .mkv takes most codecs"
DAMAGED_NOTE = "the audio is damaged; its rest was left out"
_FFV1 = {"level": "3", "slicecrc": "1"}


class _Sink(Protocol):
    """Destination of frames."""

    def write(self, frame: np.ndarray) -> None: ...
    def close(self) -> None: ...


class VideoWriter:
    """Writes uint8 RGB frames (h, w, 3), all of the same size.

    Attributes:
        name: Path of the output.
        count: Number of frames so far.
        notes: Lines that a user should see: what the format does not carry.
    """

    def __init__(
        self, name: str, shape: tuple[int, int, int], sink: _Sink, notes: Sequence[str] = ()
    ):
        self.name = name
        self.count = 0
        self.notes = notes
        self._shape = shape
        self._sink = sink

    def write(self, frame: np.ndarray) -> None:
        """Appends a frame.

        Raises:
            ValueError: If the frame has another shape or type.
            WriteFailed, DiskFull: If it cannot be written.
        """
        if frame.shape != self._shape or frame.dtype != np.uint8:
            raise ValueError(
                f"{self.name}: expected a frame uint8{self._shape}, got {frame.dtype}{frame.shape}"
            )
        with _named_errors(self.name):
            self._sink.write(frame)
        self.count += 1


# Formats


class _Container:
    """An mp4 or mkv file through PyAV."""

    def __init__(
        self,
        path: Path,
        kind: str,
        width: int,
        height: int,
        fps: Fraction,
        colour: Colour | None,
        audio: AudioTrack | None = None,
    ):
        """Opens a file; `colour` is the YUV form for .mp4, and for .mkv that of RGB or None.

        Raises:
            ValueError, FFmpegError: If the audio is damaged, or the format has no place for its
                codec.
        """
        self._colour = colour or BT709
        self._rgb = kind == ".mkv"
        # 4:2:0 has one chroma sample for 2x2 pixels, hence even sides.
        self._pad = (0, 0) if self._rgb else (height % 2, width % 2)
        options = {} if self._rgb else {"movflags": "+faststart"}
        muxer = "matroska" if self._rgb else "mp4"
        self._container = av.open(f"file:{path}", "w", format=muxer, container_options=options)
        # FFV1 compresses slices independently, in parallel; a tiny picture cannot be cut into four.
        slices = {"slices": "4"} if min(width, height) >= 16 else {}
        codec, codec_options = ("ffv1", _FFV1 | slices) if self._rgb else ("libx264", _MP4)
        stream = self._container.add_stream(codec, rate=fps, options=codec_options)
        stream.width, stream.height = width + self._pad[1], height + self._pad[0]
        stream.pix_fmt = "bgr0" if self._rgb else "yuv420p"
        context = stream.codec_context
        if colour is not None:
            context.color_primaries, context.color_trc, matrix, full = colour.code_points
            if not self._rgb:
                context.colorspace, context.color_range = matrix, 1 + full
        self._stream, self._time_base, self._count = stream, 1 / fps, 0
        self._audio = None
        self.notes: list[str] = []  # as `VideoWriter.notes`
        if audio is not None:
            try:
                self._audio = AudioMuxer(audio, self._container)
                self._container.start_encoding()  # writes the header, which names all codecs
            except (ValueError, av.FFmpegError):
                self._container.close()
                raise

    def _frame(self, rgb: np.ndarray) -> av.VideoFrame:
        height, width = rgb.shape[:2]
        if self._rgb:
            # bgr0 is how FFV1's encoder takes 8-bit RGB: blue first, the fourth byte unused.
            samples = np.zeros((height, width, 4), np.uint8)
            samples[..., :3] = rgb[..., ::-1]
            frame = av.VideoFrame(width, height, "bgr0")
            _fill(frame.planes[0], samples.reshape(height, -1))
            return frame
        rows, columns = self._pad
        padded = (
            np.pad(rgb, ((0, rows), (0, columns), (0, 0)), mode="edge") if any(self._pad) else rgb
        )
        frame = av.VideoFrame(width + columns, height + rows, "yuv420p")
        for plane, samples in zip(frame.planes, rgb_to_yuv420(padded, self._colour)):
            _fill(plane, samples)
        return frame

    def write(self, frame: np.ndarray) -> None:
        picture = self._frame(frame)
        # Frame i is shown at i / fps: time is in units of one frame.
        picture.pts, picture.time_base = self._count, self._time_base
        self._count += 1
        self._container.mux(self._stream.encode(picture))
        if self._audio is not None:
            try:
                self._audio.write_until(self._count * self._time_base)
            except ValueError:  # what PyAV makes of EINVAL and of invalid data; no error of a disk
                self._audio.close()
                self._audio = None
                self.notes.append(DAMAGED_NOTE)

    def close(self) -> None:
        try:
            # The encoder holds frames back to reorder them; None asks for the rest.
            if self._count:
                self._container.mux(self._stream.encode())
        finally:
            self._container.close()
            if self._audio is not None:
                self._audio.close()


def _fill(plane: VideoPlane, samples: np.ndarray) -> None:
    """Copies (rows, bytes) into a plane, whose lines may be longer."""
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
    rows[: len(samples), : samples.shape[1]] = samples


class _Y4m:
    """Frames behind a YUV4MPEG2 header."""

    def __init__(
        self, file: BinaryIO, width: int, height: int, fps: Fraction, colour: Colour, chroma: str
    ):
        self._file = file
        self._colour = Colour(full_range=colour.full_range)
        self._convert = {"420": rgb_to_yuv420, "444": rgb_to_yuv444}[chroma]
        # "jpeg" stands for chroma in the middle of the luma samples; it does not mean full range.
        tag = "420jpeg" if chroma == "420" else chroma
        span = "FULL" if colour.full_range else "LIMITED"
        rate = f"{fps.numerator}:{fps.denominator}"
        header = f"YUV4MPEG2 W{width} H{height} F{rate} Ip A1:1 C{tag} XCOLORRANGE={span}\n"
        file.write(header.encode())

    def write(self, frame: np.ndarray) -> None:
        planes = self._convert(frame, self._colour)
        self._file.write(b"".join([b"FRAME\n", *(plane.tobytes() for plane in planes)]))

    def close(self) -> None:
        self._file.flush()
        if self._file is not sys.stdout.buffer:
            self._file.close()


class _Pictures:
    """Numbered PNG files."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self._folder, self._count = folder, 0

    def write(self, frame: np.ndarray) -> None:
        self._count += 1
        Image.fromarray(frame).save(self._folder / f"{self._count:06d}.png", compress_level=1)

    def close(self) -> None:
        pass


# Places


def _is_folder(path: str | os.PathLike) -> bool:
    name = os.fspath(path)
    return name.endswith(("/", os.sep)) or os.path.isdir(name) or not Path(name).suffix


def _check_target(target: Path, name: str, folder: bool, force: bool) -> None:
    if not folder and target.suffix.lower() not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise UnwritableOutput(name, f"the output must be {known} or a folder, got {target.suffix}")
    if not target.parent.is_dir():
        raise UnwritableOutput(name, "the folder to write to does not exist")
    if folder and target.is_dir():
        pictures = [f.name for f in target.iterdir() if f.suffix.lower() == ".png"]
        if pictures and not force:
            raise OutputExists(name, "the folder has images in it; not overwritten")
        if not all(map(_FRAME_NAME.fullmatch, pictures)):
            raise OutputExists(name, "the folder has images that are not numbered frames")
    elif folder and target.exists():
        raise UnwritableOutput(name, "exists and is not a folder")
    elif would_overwrite(target) and not force:
        raise OutputExists(name, "exists already; not overwritten")


def _replace_frames(temporary: Path, target: Path) -> None:
    """Replaces the frames of an existing folder by complete ones; other files in it stay."""
    for old in target.iterdir():
        if _FRAME_NAME.fullmatch(old.name):
            old.unlink()
    for new in sorted(temporary.iterdir()):
        os.replace(new, target / new.name)


@contextlib.contextmanager
def _named_errors(name: str) -> Iterator[None]:
    try:
        yield
    except av.FFmpegError as error:
        raise write_error(name, OSError(error.errno, error.strerror)) from None
    except OSError as error:
        raise write_error(name, error) from None


@contextlib.contextmanager
def open_writer(
    path: str | os.PathLike,
    width: int,
    height: int,
    fps: Fraction | float,
    colour: Colour | None = None,
    force: bool = False,
    chroma: str = "420",
    audio: AudioTrack | None = None,
) -> Iterator[VideoWriter]:
    """Opens a video for writing; it appears when the `with` block ends without an error.

    Args:
        path: Path of the output, or "-" for y4m on standard output.
        width: Width in pixels.
        height: Height in pixels.
        fps: Frames per second.
        colour: Colour space of the frames; if None, BT.709 with limited range. It determines
            matrix, range and tags of .mp4 (see `Colour.in_yuv`), the range of .y4m, and the tags of
            .mkv, which has none by default. Other outputs note that HDR and wide gamut are lost.
        force: Whether to overwrite; in a folder, only numbered frames are replaced.
        chroma: "420" or "444", for .y4m.
        audio: Audio for .mp4 and .mkv; a note says if it has to be left out.

    Raises:
        OutputExists: If the output exists, and `force` is not given.
        UnwritableOutput: If the output cannot be created.
        WriteFailed: If writing fails, or there are no frames.
        DiskFull: If the disk is full.
    """
    name = os.fspath(path)
    # Exact for 30000/1001 and the like, and small enough for the 32 bits that containers have.
    fps = Fraction(fps).limit_denominator(100_000)
    tags, colour = colour, BT709 if colour is None else colour.in_yuv()
    shape = (height, width, 3)
    notes = (TAGLESS_NOTE,) if colour.is_hdr_or_wide else ()
    if audio is not None:
        notes += (SILENT_NOTE,)
    if name == "-":
        try:
            with _named_errors(name):
                sink: _Sink = _Y4m(sys.stdout.buffer, width, height, fps, colour, chroma)
            yield VideoWriter(name, shape, sink, notes)
            with _named_errors(name):
                sink.close()
        except WriteFailed:
            # Python writes what stdout still buffers at exit; failing again would change the exit
            # code.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise
        return

    folder, target = _is_folder(path), Path(path)
    into = target.is_dir()
    with _named_errors(name):
        _check_target(target, name, folder, force)
    with contextlib.ExitStack() as place:
        with _named_errors(name):
            # Frames for an existing folder wait inside it, since its parent may be on another disk.
            output = temporary_path(target, "frames") if into else atomic_output(target)
            temporary = place.enter_context(output)
            if folder:
                sink = _Pictures(temporary)
            elif target.suffix.lower() == ".y4m":
                sink = _Y4m(open(temporary, "wb"), width, height, fps, colour, chroma)
            else:
                kind = target.suffix.lower()
                given = temporary, kind, width, height, fps, tags if kind == ".mkv" else colour
                try:
                    sink = _Container(*given, audio)
                    notes = sink.notes
                except (ValueError, av.FFmpegError):
                    if audio is None:
                        raise
                    sink, notes = _Container(*given), (SILENT_NOTE,)
        writer = VideoWriter(name, shape, sink, notes)
        try:
            yield writer
            if writer.count == 0:
                raise WriteFailed(name, "there were no frames to write")
            with _named_errors(name):
                sink.close()
        except BaseException:
            with contextlib.suppress(Exception):
                sink.close()
            raise
        with _named_errors(name):
            if into:
                _replace_frames(temporary, target)
            place.close()
