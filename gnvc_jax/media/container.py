"""Videos that PyAV can open: mp4, mkv, webm, avi, gif and so on.

Planes come from the decoder and are converted by `colour.yuv_to_rgb`; swscale only repacks samples
(nv12, palettes) and reduces RGB of more than 8 bits.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.video.plane import VideoPlane
from av.video.stream import VideoStream

from gnvc_jax.media.colour import SUPPORTED_MATRICES, UNSPECIFIED, Colour, yuv_to_rgb
from gnvc_jax.media.errors import (
    DamagedVideo,
    NoFrames,
    TruncatedVideo,
    UnsupportedFormat,
)
from gnvc_jax.media.packets import (
    format_names,
    has_complete_index,
    index_timeline,
    missing_data_note,
    open_stream,
    packets,
    promised_frames,
    read_timeline,
    stream_seconds,
    time_base,
    video_streams,
)
from gnvc_jax.media.video import (
    CUT_NOTE,
    DEFAULT_FPS,
    Crop,
    Findings,
    VideoInfo,
    VideoReader,
    crop_frame,
    pixel_shape_note,
)

_PLANAR = re.compile(r"yuv[aj]?(420|422|440|444)p(\d+[lb]e)?")
_GREY = re.compile(r"gray(\d+[lb]e)?")
_PACKED_BIG_ENDIAN = re.compile(r"(?:rgb|bgr)5[56]5be")
_LIMITED, _FULL = 1, 2  # AVColorRange
# swscale's threads race on some formats: 16-bit grey with alpha came out with wrong rows.
_SCALER_THREADS = 1
_GBR = 0  # H.273 matrix coefficients of RGB


# Frames


def _is_rgb(frame: av.VideoFrame) -> bool:
    return frame.format.is_rgb or frame.format.has_palette


def frame_colour(frame: av.VideoFrame) -> Colour:
    """Colour space of a frame: as tagged, or BT.709.

    Untagged YUV has limited range, untagged grey full range. YUV that is tagged as RGB, as some
    phones and messengers do, gets the matrix that is usual for its size: BT.709 for HD, BT.601
    below.
    """
    tags = frame.color_primaries, frame.color_trc
    if _is_rgb(frame):
        return Colour.from_code_points(*tags, _GBR, full_range=True)
    # yuvj formats are old names of full range, from before the range had a tag.
    full = frame.color_range == _FULL or frame.format.name.startswith("yuvj")
    if len(frame.format.components) < 3 and frame.color_range != _LIMITED:
        full = True
    matrix = frame.colorspace
    if matrix == _GBR:
        matrix = 1 if frame.width >= 1280 or frame.height > 576 else 6
    return Colour.from_code_points(*tags, matrix, full)


def _array(plane: VideoPlane, dtype: str) -> np.ndarray:
    # Lines are padded to a multiple of some bytes: (height, line size) -> (height, width).
    rows = np.frombuffer(memoryview(plane), dtype).reshape(plane.height, -1)
    return rows[:, : plane.width]


def _planar_name(frame: av.VideoFrame, name: str) -> str:
    """Planar format that holds all samples of a packed or unusual format."""
    form = frame.format
    parts = form.components
    depth = max(part.bits for part in parts)
    suffix = "" if depth <= 8 else f"{depth}le"
    if form.name.startswith(("xyz", "bayer")) or depth > 16:
        raise UnsupportedFormat(name, f"pixel format {form.name} is not supported")
    if len(parts) < 3:
        return f"gray{suffix}"
    # By which factors chroma is smaller than luma. 4:1:1 and 4:1:0 have no planar format that
    # `yuv_to_rgb` takes, so they are enlarged to 4:4:4.
    halves = frame.width > parts[1].width, frame.height > parts[1].height
    quarter = parts[1].width * 2 < frame.width
    layout = {(True, True): "420", (True, False): "422"}.get(halves, "444")
    return f"yuv{'444' if quarter else layout}p{suffix}"


def _little_endian(frame: av.VideoFrame) -> av.VideoFrame:
    """Swaps the bytes of 16-bit pixels; swscale converts only little-endian ones correctly."""
    swapped = av.VideoFrame(frame.width, frame.height, frame.format.name.replace("be", "le"))
    source, target = (
        np.frombuffer(memoryview(f.planes[0]), "u2").reshape(f.height, -1) for f in (frame, swapped)
    )
    target[:, : frame.width] = source[:, : frame.width].byteswap()
    return swapped


def _upright(rgb: np.ndarray, matrix: bytes, name: str) -> np.ndarray:
    """Rotates and mirrors a picture (h, w, c) as its display matrix asks.

    The matrix sends column x and row y of the coded picture to a x + c y and b x + d y, up to an
    offset; multiples of 90 degrees and mirrors have either b = c = 0 or a = d = 0.
    """
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    straight, turned = abs(a) + abs(d), abs(b) + abs(c)
    if 50 * min(straight, turned) > max(straight, turned):  # more than a degree away
        raise UnsupportedFormat(name, "is rotated by an angle that is not a multiple of 90 degrees")
    if straight >= turned:
        columns, rows = a, d
    else:
        rgb, columns, rows = rgb.swapaxes(0, 1), c, b
    return np.ascontiguousarray(rgb[:: -1 if rows < 0 else 1, :: -1 if columns < 0 else 1])


def frame_to_rgb(
    frame: av.VideoFrame, colour: Colour | None, name: str, crop: Crop | None = None
) -> np.ndarray:
    """Converts a decoded frame to uint8 RGB (h, w, 3), rotated as it is to be shown.

    Args:
        frame: Decoded frame.
        colour: Colour space that overrides the tags of a YUV frame.
        name: Name of the file, for messages.
        crop: (top, left, height, width) of the shown frame; only this part is converted.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    # The crop is one of the shown frame, so a rotated frame is converted whole and cropped after.
    inner = None if matrix else crop
    form = frame.format
    # RGB needs no colour conversion, which swscale would round; YUV is converted by `yuv_to_rgb`,
    # exactly, from its planes.
    if _is_rgb(frame):
        if _PACKED_BIG_ENDIAN.fullmatch(form.name):
            frame = _little_endian(frame)
        rgb = crop_frame(frame.to_ndarray(format="rgb24", threads=_SCALER_THREADS), inner)
    else:
        colour = colour or frame_colour(frame)
        if not (_PLANAR.fullmatch(form.name) or _GREY.fullmatch(form.name)):
            frame = frame.reformat(format=_planar_name(frame, name), threads=_SCALER_THREADS)
            form = frame.format
        depth = form.components[0].bits
        dtype = "u1" if depth <= 8 else ">u2" if form.is_big_endian else "<u2"
        planes = [_array(plane, dtype) for plane in frame.planes[:3]]
        # Grey has a single plane. A fourth plane, alpha, was left out above.
        y, u, v = planes if len(planes) == 3 else (planes[0], None, None)
        rgb = yuv_to_rgb(y, u, v, colour, depth, inner)
    return crop_frame(_upright(rgb, matrix, name), crop) if matrix else rgb


# Files


def _decode(
    name: str,
    container: InputContainer,
    stream: VideoStream,
    promised: int | None = None,
    tolerant: bool = False,
    findings: Findings | None = None,
) -> Iterator[av.VideoFrame]:
    """Yields all frames in display order.

    An incomplete last frame is left out, with a note.

    Args:
        name: Name of the file, for messages.
        container: Open container.
        stream: Video stream.
        promised: Number of frames that the container states, if any.
        tolerant: Whether to note damage and missing frames instead of raising.
        findings: Receives the notes.

    Raises:
        DamagedVideo: If a frame before the last one is damaged.
        TruncatedVideo: If frames are missing at the end.
    """
    findings = findings or Findings()
    stream.codec_context.copy_opaque = True  # frames carry the number of their packet
    done, damaged, lost, flagged, end = 0, 0, 0, 0, 0.0
    longest = 1 / float(stream.average_rate or stream.guessed_rate or DEFAULT_FPS)
    number, incomplete, reason = -1, False, ""
    try:
        # Look one packet ahead, to recognise the last one. None flushes the decoder.
        ahead = itertools.chain(packets(container, stream), (None, None))
        for packet, following in itertools.pairwise(ahead):
            if packet is not None:
                number += 1
                packet.opaque = number
                if packet.is_corrupt and following is None:
                    incomplete = True
                    continue
                flagged += packet.is_corrupt
            try:
                # A packet can give no frame, or several: decoders hold some back to reorder them.
                frames = stream.decode(packet)
            except av.FFmpegError as error:
                if not tolerant:
                    raise
                lost, reason = lost + 1, f" ({error.strerror})"
                continue
            for frame in frames:
                if frame.is_corrupt and following is None and frame.opaque == number:
                    incomplete = True
                    continue
                if frame.is_corrupt and not tolerant:
                    raise DamagedVideo(
                        name, f"damaged: the decoder had to make up parts of frame {done}"
                    )
                yield frame
                done, damaged = done + 1, damaged + frame.is_corrupt
                # The latest time and the longest distance so far, to check the length by below.
                if frame.pts is not None:
                    time = float(frame.pts * time_base(stream))
                    longest = max(longest, time - end) if done > 1 else longest
                    end = max(end, time)
    except av.FFmpegError as error:
        if not tolerant:
            raise DamagedVideo(
                name, f"damaged: decoding stopped after {done} frames ({error.strerror})"
            ) from None
        lost, reason = lost + 1, f" ({error.strerror})"
    if incomplete:
        findings.note(CUT_NOTE)
        findings.note("the last frame is incomplete and left out")
    if flagged:
        findings.note(f"data may be missing before {flagged} of {done} frames")
    if damaged or lost:
        findings.damage(
            f"damaged: the decoder had to make up parts of {damaged} of {done} frames,"
            f" {lost} more could not be decoded{reason}"
        )
    # Last, what is missing at the end: by the number of frames if the container states it, else by
    # the length.
    length = stream_seconds(container, stream)
    if promised is not None and done < promised:
        missing = f"promises {promised} frames, {done} could be read"
    # The last frame may be shown as long as any other, and times are rounded.
    elif promised is None and length - end > 1.5 * longest + 0.01:
        missing = f"promises {length:.2f} s, {done} frames could be read, to {end:.2f} s"
    else:
        return
    if not tolerant:
        raise TruncatedVideo(name, f"truncated: {missing}")
    findings.damage(f"truncated: {missing}")


def _rate(name: str, stream: VideoStream, number: int | None) -> tuple[Fraction, bool]:
    """Frames per second, and whether the distance between frames varies."""
    nominal = stream.average_rate or stream.codec_context.framerate
    rate, varies = nominal or DEFAULT_FPS, False
    listed = has_complete_index(stream) and stream.duration
    if listed:
        rate, varies = index_timeline(stream).rate(nominal)
    # The index holds decoding times. If these vary, the display times must be read from the
    # packets, which takes a second pass, thus a regular file.
    if (varies or not listed) and os.path.isfile(name):
        rate, varies = read_timeline(name, number).rate(nominal)
    return rate, varies


def _describe(
    name: str,
    container: InputContainer,
    stream: VideoStream,
    number: int | None,
    findings: Findings,
) -> Fraction:
    """Returns frames per second; notes what is not carried and what was decided."""
    rate, varies = _rate(name, stream, number)
    if varies:
        findings.note(f"the frame rate varies; its mean of {float(rate):.3f} frames/s is used")
    streams = video_streams(container)
    if number is None and len(streams) > 1:
        findings.note(
            f"has {len(streams)} video streams; number {streams.index(stream)},"
            f" {stream.width}x{stream.height}, is used"
        )
    findings.note(pixel_shape_note(stream.sample_aspect_ratio))
    if os.path.isfile(name):
        findings.note(missing_data_note(name, container))
    return rate


def _matrix_note(frame: av.VideoFrame) -> str:
    """Note on a colour matrix that was not used as tagged; empty if it was."""
    matrix = frame.colorspace
    if _is_rgb(frame) or matrix == UNSPECIFIED or (matrix in SUPPORTED_MATRICES and matrix != _GBR):
        return ""
    used = frame_colour(frame).matrix.upper().replace("BT", "BT.")
    if matrix == _GBR:
        return f"is tagged as RGB but holds YUV; the matrix of {used} is used"
    return f"matrix {matrix} of ITU-T H.273 is not supported; that of {used} is used"


def open_container(
    path: str | os.PathLike,
    fps: Fraction | None = None,
    colour: Colour | None = None,
    number: int | None = None,
    tolerant: bool = False,
) -> VideoReader:
    """Opens video stream `number` for reading; `fps` and `colour` override what the file says."""
    name, findings = os.fspath(path), Findings()
    container, stream = open_stream(path, number)
    try:
        if stream.codec_context is None:
            raise UnsupportedFormat(name, "there is no decoder for its video stream")
        # With frame threads an error is reported late, and frames decoded before it are lost.
        stream.thread_type = "SLICE" if tolerant else "AUTO"
        try:
            # By the index, if there is one: a file that was cut off is known before it is decoded.
            promised = promised_frames(name, container, stream, number)
        except TruncatedVideo as error:
            if not tolerant:
                raise
            promised = None
            findings.damage(error.reason)
        frames = _decode(name, container, stream, promised, tolerant, findings)
        # Size, colour and bit depth are those of the first frame: containers may state others.
        first = _first(name, container, frames)
        rgb = _is_rgb(first)
        shown = frame_colour(first) if colour is None or rgb else colour
        if colour is None:
            findings.note(_matrix_note(first))
        height, width = frame_to_rgb(first, colour, name).shape[:2]
        rate = _describe(name, container, stream, number, findings)
        info = VideoInfo(
            name=name,
            width=width,
            height=height,
            fps=rate if fps is None else fps,
            frames=promised,
            colour=shown,
            bit_depth=8 if rgb else first.format.components[0].bits,
            has_audio=bool(container.streams.audio),
        )
    except BaseException:
        container.close()
        raise

    def rgb_frames() -> Iterator[np.ndarray]:
        for place, frame in enumerate(itertools.chain([first], frames)):
            # A stream may change its size or format on the way; a .gnvc file cannot.
            if (frame.width, frame.height) != (first.width, first.height):
                raise UnsupportedFormat(
                    name,
                    f"frame {place} is {frame.width}x{frame.height},"
                    f" the first one {first.width}x{first.height}",
                )
            if _is_rgb(frame) != rgb:
                kinds = ("YUV", "RGB") if rgb else ("RGB", "YUV")
                raise UnsupportedFormat(
                    name, f"frame {place} is {kinds[0]}, the first one {kinds[1]}"
                )
            yield frame_to_rgb(frame, colour, name)

    return VideoReader(info, rgb_frames(), container.close, findings)


def _first(name: str, container: InputContainer, frames: Iterator[av.VideoFrame]) -> av.VideoFrame:
    try:
        first = next(frames, None)
    except DamagedVideo:
        if "webp_pipe" not in format_names(container):
            raise
        first = None
    if first is None and "webp_pipe" in format_names(container):
        raise UnsupportedFormat(name, "animated WebP pictures are not supported")
    if first is None:
        raise NoFrames(name, "no frame could be decoded")
    return first


def count_frames(path: str | os.PathLike, number: int | None = None) -> int:
    """Counts the frames of a video stream, by reading all packets if the container has no index."""
    name = os.fspath(path)
    container, stream = open_stream(path, number)
    with container:
        promised = promised_frames(name, container, stream, number)
        if has_complete_index(stream) and promised is not None:
            return promised
    count = read_timeline(path, number).count
    if promised is not None and count < promised:
        raise TruncatedVideo(name, f"truncated: promises {promised} frames, holds {count} of them")
    return count


# Random access


def _seek_frames(path: str, wanted: np.ndarray, keys: np.ndarray) -> list[av.VideoFrame]:
    """Decodes the frames at the times `wanted` from the key frame before; some may be missing."""
    container, stream = open_stream(path)
    found: dict[int, av.VideoFrame] = {}
    with container, contextlib.suppress(av.FFmpegError):
        stream.codec_context.thread_count = 1
        key = keys[max(0, np.searchsorted(keys, wanted[0], side="right") - 1)]
        # Lands on the key frame or before it; frames that are not wanted are decoded and dropped.
        container.seek(int(key), stream=stream)
        # Frames come in display order, so decoding ends at the last one that is wanted.
        times = set(wanted.tolist())
        for frame in container.decode(stream):
            if frame.pts is not None and frame.pts in times and not frame.is_corrupt:
                found[frame.pts] = frame
            if len(found) == len(times) or (frame.pts or 0) > wanted[-1]:
                break
    return [found[t] for t in wanted.tolist() if t in found]


def read_container_clip(
    path: str | os.PathLike, start: int, count: int, crop: Crop | None = None
) -> np.ndarray:
    """Frames start .. start + count - 1 as uint8 RGB (count, h, w, 3); see `reader.read_clip`."""
    name, timeline = os.fspath(path), read_timeline(path)
    frames = []
    times, keys = timeline.times, timeline.keys
    if times is not None and keys is not None and len(keys) and start + count <= timeline.count:
        frames = _seek_frames(name, times[start : start + count], keys)
    if len(frames) < count:
        # There are no times, or decoding cannot start at a key frame: count from the beginning.
        container, stream = open_stream(name)
        with container:
            frames = list(itertools.islice(_decode(name, container, stream), start, start + count))
    if len(frames) < count:
        raise TruncatedVideo(
            name, f"frames {start} to {start + count - 1} asked for, {len(frames)} of them found"
        )
    return np.stack([frame_to_rgb(frame, None, name, crop) for frame in frames])
