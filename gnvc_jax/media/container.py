"""Everything that PyAV can open: mp4, mkv, webm, avi, gif and so on.

The planes come from the decoder and are converted by `colour.yuv_to_rgb`; swscale only
repacks samples (nv12, palettes) and reduces RGB of more than 8 bits.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np

from gnvc_jax.media.colour import RGB, Colour, yuv_to_rgb
from gnvc_jax.media.errors import (
    AudioOnly,
    MissingInput,
    NoFrames,
    NotAVideo,
    TruncatedVideo,
    UnsupportedFormat,
)
from gnvc_jax.media.video import DEFAULT_FPS, Crop, VideoInfo, VideoReader, crop_frame

_PLANAR = re.compile(r"yuv[aj]?(420|422|440|444)p(\d+[lb]e)?")
_GREY = re.compile(r"gray(\d+[lb]e)?")
_NOT_VIDEO = {"tty", "concat", "hls", "image2"}  # text, and lists that name other files
_LIMITED, _FULL = 1, 2  # AVColorRange


# Frames


def frame_colour(frame: av.VideoFrame) -> Colour:
    """What the stream says, or BT.709. Untagged YUV has limited range, untagged grey full range."""
    name = frame.format.name
    if frame.format.is_rgb or frame.format.has_palette:
        return RGB
    full = frame.color_range == _FULL or name.startswith("yuvj")
    if _GREY.fullmatch(name) and frame.color_range != _LIMITED:
        full = True
    return Colour.from_code_points(frame.color_primaries, frame.color_trc, frame.colorspace, full)


def _array(plane: av.video.plane.VideoPlane, dtype: str) -> np.ndarray:
    rows = np.frombuffer(plane, dtype).reshape(plane.height, -1)
    return rows[:, : plane.width]


def _planar_name(frame: av.VideoFrame, name: str) -> str:
    """The planar format of at least the same samples as a packed or unusual one."""
    form = frame.format
    parts = form.components
    depth = max(part.bits for part in parts)
    suffix = "" if depth <= 8 else f"{depth}le"
    if len(parts) < 3:
        return f"gray{suffix}"
    if form.name.startswith(("xyz", "bayer")):
        raise UnsupportedFormat(name, f"pixel format {form.name} is not supported")
    halves = tuple(
        full > part
        for full, part in zip((frame.width, frame.height), (parts[1].width, parts[1].height))
    )
    quarter = parts[1].width * 2 < frame.width
    layout = {(True, True): "420", (True, False): "422"}.get(halves, "444")
    return f"yuv{'444' if quarter else layout}p{suffix}"


def frame_to_rgb(
    frame: av.VideoFrame, colour: Colour, name: str, crop: Crop | None = None
) -> np.ndarray:
    """A decoded frame, or a part of it, as uint8 RGB (h, w, 3), rotated as it is to be shown."""
    quarter_turns = round(frame.rotation / 90) % 4
    inner = None if quarter_turns else crop
    form = frame.format
    if form.is_rgb or form.has_palette:
        rgb = crop_frame(frame.to_ndarray(format="rgb24"), inner)
    else:
        if not (_PLANAR.fullmatch(form.name) or _GREY.fullmatch(form.name)):
            frame = frame.reformat(format=_planar_name(frame, name))
            form = frame.format
        depth = form.components[0].bits
        dtype = "u1" if depth <= 8 else ">u2" if form.is_big_endian else "<u2"
        planes = [_array(plane, dtype) for plane in frame.planes[:3]]
        y, u, v = planes if len(planes) == 3 else (planes[0], None, None)
        rgb = yuv_to_rgb(y, u, v, colour, depth, inner)
    if not quarter_turns:
        return rgb
    return np.ascontiguousarray(crop_frame(np.rot90(rgb, quarter_turns), crop))


# Files


@contextlib.contextmanager
def _named_errors(name: str):
    """PyAV's exceptions as ours."""
    try:
        yield
    except (av.FileNotFoundError, av.PermissionError) as error:
        raise MissingInput(name, f"cannot be read ({error.strerror})") from None
    except (av.FFmpegError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NotAVideo(name, f"not a video that can be read ({reason})") from None


def _open(path: str | os.PathLike) -> tuple[av.container.InputContainer, av.video.VideoStream]:
    name = os.fspath(path)
    with _named_errors(name):
        # "file:" keeps a colon in the name from being read as a protocol.
        container = av.open(f"file:{name}", options={"protocol_whitelist": "file"})
    try:
        if _NOT_VIDEO & set(container.format.name.split(",")):
            raise NotAVideo(name, "not a video that can be read")
        # A cover picture is not a film.
        streams = [
            s
            for s in container.streams.video
            if not s.disposition & av.stream.Disposition.attached_pic
        ]
        if not streams:
            if container.streams.audio:
                raise AudioOnly(name, "has sound but no picture")
            raise NotAVideo(name, "has no video stream")
        return container, streams[0]
    except BaseException:
        container.close()
        raise


def _fps(stream: av.video.VideoStream) -> Fraction:
    return stream.average_rate or stream.guessed_rate or DEFAULT_FPS


def _complete_index(stream: av.video.VideoStream) -> bool:
    """Whether the container lists every frame, as mp4 and avi do."""
    return stream.frames > 0 and len(stream.index_entries) == stream.frames


def _packets(container, stream) -> Iterator[av.Packet]:
    """Packets from the first key frame on; nothing before it can be decoded."""
    return itertools.dropwhile(lambda packet: not packet.is_keyframe, container.demux(stream))


def _is_leading(packet: av.Packet, first: av.Packet) -> bool:
    """Whether a picture is shown before the first key frame.

    It then refers to pictures that were cut off, and decoders leave it out. Matroska has no times
    below zero, which is where such pictures lie.
    """
    if packet.pts is None or first.pts is None:
        return packet.pts is None and "matroska" in packet.stream.container.format.name
    return packet.pts < first.pts


def _count(name: str, container, stream) -> int | None:
    """Frames by the container's own list; None without one. TruncatedVideo if data is missing."""
    if not _complete_index(stream):
        return stream.frames or None
    entries = itertools.dropwhile(lambda e: not e.is_keyframe, stream.index_entries)
    entries = [e for e in entries if e.size and not e.is_discard]
    present = sum(e.pos + e.size <= container.size for e in entries)
    if present < len(entries):
        raise TruncatedVideo(
            name, f"truncated: promises {len(entries)} frames, holds {present} of them"
        )
    return len(entries) - _count_leading(name)


def _count_leading(name: str) -> int:
    container, stream = _open(name)
    with container, _named_errors(name):
        packets = _packets(container, stream)
        first = next(packets, None)  # leading pictures come right after it
        leading = itertools.takewhile(lambda p: p.size and _is_leading(p, first), packets)
        return sum(not packet.is_discard for packet in leading)


def _decode(name: str, container, stream, promised: int | None) -> Iterator[av.VideoFrame]:
    """All frames in order of display; TruncatedVideo where they end too early."""
    done, end, longest = 0, 0.0, 1 / float(_fps(stream))
    reason = ""
    try:
        for packet in _packets(container, stream):
            for frame in packet.decode():
                yield frame
                done += 1
                if frame.time is not None:
                    longest = max(longest, frame.time - end) if done > 1 else longest
                    end = max(end, frame.time)
    except av.FFmpegError as error:
        reason = f" ({error.strerror})"
    if promised is not None and done < promised:
        raise TruncatedVideo(
            name, f"truncated: promises {promised} frames, {done} could be read{reason}"
        )
    if reason:
        raise TruncatedVideo(name, f"damaged: decoding stopped after {done} frames{reason}")
    length = _stream_seconds(container, stream)
    # The last frame may be shown as long as any other, and times are rounded.
    if promised is None and length - end > 1.5 * longest + 0.01:
        raise TruncatedVideo(
            name, f"truncated: promises {length:.2f} s, {done} frames could be read, to {end:.2f} s"
        )


def _stream_seconds(container, stream) -> float:
    """How long a container without a frame list says that its video is; 0 if it does not."""
    tag = stream.metadata.get("DURATION", "")  # Matroska: hours:minutes:seconds
    if match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", tag):
        hours, minutes, seconds = match.groups()
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    if "matroska" in container.format.name and len(container.streams) == 1 and container.duration:
        return container.duration / av.time_base
    return 0.0


def open_container(
    path: str | os.PathLike, fps: Fraction | None = None, colour: Colour | None = None
) -> VideoReader:
    """A reader of the first video stream; `fps` and `colour` replace what the file says."""
    name = os.fspath(path)
    container, stream = _open(path)
    try:
        stream.thread_type = "AUTO"
        count = _count(name, container, stream)
        frames = _decode(name, container, stream, count)
        first = next(frames, None)
        if first is None:
            raise NoFrames(name, "no frame could be decoded")
        tagged = frame_colour(first)
        chosen = colour if colour is not None and tagged.matrix != "rgb" else tagged
        height, width = frame_to_rgb(first, chosen, name).shape[:2]
        info = VideoInfo(
            name=name,
            width=width,
            height=height,
            fps=Fraction(fps or _fps(stream)),
            frames=count,
            colour=chosen,
            bit_depth=8 if chosen.matrix == "rgb" else first.format.components[0].bits,
            has_audio=bool(container.streams.audio),
        )
    except BaseException:
        container.close()
        raise

    def rgb_frames() -> Iterator[np.ndarray]:
        for number, frame in enumerate(itertools.chain([first], frames)):
            if (frame.width, frame.height) != (first.width, first.height):
                raise UnsupportedFormat(
                    name,
                    f"frame {number} is {frame.width}x{frame.height},"
                    f" the first one {first.width}x{first.height}",
                )
            yield frame_to_rgb(frame, chosen, name)

    return VideoReader(info, rgb_frames(), container.close)


def count_frames(path: str | os.PathLike) -> int:
    """Frames of the video stream; if the container has no list, by reading all packets."""
    name = os.fspath(path)
    container, stream = _open(path)
    with container:
        promised = _count(name, container, stream)
        if _complete_index(stream):
            return promised
        with _named_errors(name):
            count = len(_shown_packets(container, stream))
    if promised is not None and count < promised:
        raise TruncatedVideo(name, f"truncated: promises {promised} frames, holds {count} of them")
    return count


def _shown_packets(container, stream) -> list[tuple[int | None, bool]]:
    """(time, is key frame) of every frame that will be shown, in order of decoding."""
    packets = _packets(container, stream)
    first = next(packets, None)
    return [
        (packet.pts, packet.is_keyframe)
        for packet in itertools.chain([first] if first else [], packets)
        if packet.size and not packet.is_discard and not _is_leading(packet, first)
    ]


# Random access


@functools.lru_cache(maxsize=256)
def _timeline(path: str, size: int, mtime_ns: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Times of all frames and of the key frames, ascending; None if the packets do not say."""
    del size, mtime_ns  # part of the key: a file that changed is read again
    container, stream = _open(path)
    with container, _named_errors(path):
        packets = _shown_packets(container, stream)
    if any(time is None for time, _ in packets):
        return None
    times = np.sort(np.array([time for time, _ in packets], np.int64))
    keys = np.sort(np.array([time for time, is_key in packets if is_key], np.int64))
    if not len(keys) or len(np.unique(times)) < len(times):
        return None
    return times, keys


def _seek_frames(path: str, wanted: np.ndarray, keys: np.ndarray) -> list[av.VideoFrame]:
    """The frames shown at the times `wanted`, decoded from the key frame before; may miss some."""
    container, stream = _open(path)
    found: dict[int, av.VideoFrame] = {}
    with container, contextlib.suppress(av.FFmpegError):
        stream.codec_context.thread_count = 1
        key = keys[max(0, np.searchsorted(keys, wanted[0], side="right") - 1)]
        container.seek(int(key), stream=stream)
        times = set(wanted.tolist())
        for frame in container.decode(stream):
            if frame.pts in times and not frame.is_corrupt:
                found[frame.pts] = frame
            if len(found) == len(times) or (frame.pts or 0) > wanted[-1]:
                break
    return [found[t] for t in wanted.tolist() if t in found]


def read_container_clip(
    path: str | os.PathLike, start: int, count: int, crop: Crop | None = None
) -> np.ndarray:
    """Frames start .. start + count - 1 as uint8 RGB (count, h, w, 3); see `reader.read_clip`."""
    name = os.fspath(path)
    stat = os.stat(name)
    timeline = _timeline(name, stat.st_size, stat.st_mtime_ns)
    frames = []
    if timeline is not None and start + count <= len(timeline[0]):
        times, keys = timeline
        frames = _seek_frames(name, times[start : start + count], keys)
    if len(frames) < count:
        # No times, or a stream that cannot be entered at its key frames: count from the beginning.
        container, stream = _open(name)
        with container:
            decoded = _decode(name, container, stream, promised=None)
            frames = list(itertools.islice(decoded, start, start + count))
    if len(frames) < count:
        raise TruncatedVideo(
            name, f"frames {start} to {start + count - 1} asked for, {len(frames)} of them found"
        )
    colour = frame_colour(frames[0])
    return np.stack([frame_to_rgb(frame, colour, name, crop) for frame in frames])
