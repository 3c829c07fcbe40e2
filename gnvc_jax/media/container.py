"""Videos that PyAV can open: mp4, mkv, webm, avi, gif and so on.

`open_container` reads a whole video and finds damage, `read_container_clip` some of its frames.
`gnvc_jax.media.decoded_frame` turns what the decoder gives into RGB.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from gnvc_jax.media.colour import SUPPORTED_MATRICES, UNSPECIFIED, Colour
from gnvc_jax.media.decoded_frame import GBR, frame_colour, frame_to_rgb, is_rgb
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
    pixel_shape_note,
)

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
    if is_rgb(frame) or matrix == UNSPECIFIED or (matrix in SUPPORTED_MATRICES and matrix != GBR):
        return ""
    used = frame_colour(frame).matrix.upper().replace("BT", "BT.")
    if matrix == GBR:
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
        rgb = is_rgb(first)
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
            if is_rgb(frame) != rgb:
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
