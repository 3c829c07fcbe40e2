"""Facts about a video that its container tells without decoding: stream, frames, times, gaps.

`open_stream` chooses the stream. `Timeline` holds the times of all frames, from the index of the
container if it is complete (mp4, avi), otherwise from reading every packet once; rates, seeking and
frame counts are based on it. `missing_data_note` recognises incomplete files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np
from av.container import Container, InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from gnvc_jax.media.errors import AudioOnly, MissingInput, NotAVideo, TruncatedVideo
from gnvc_jax.media.video import CUT_NOTE, DEFAULT_FPS, HOLE_NOTE

_NOT_VIDEO = {"tty", "concat", "hls", "image2"}  # text, and lists that name other files
_LONGEST_GAP = 10.0  # seconds; beyond it, time stamps count as jumps, as in ffmpeg
_LARGEST_DENOMINATOR = 100_000  # of a mean rate, so that every output format can hold it


@contextlib.contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Context that turns exceptions of PyAV into ours."""
    try:
        yield
    except (av.FileNotFoundError, av.PermissionError) as error:
        raise MissingInput(name, f"cannot be read ({error.strerror})") from None
    except (av.FFmpegError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NotAVideo(name, f"not a video that can be read ({reason})") from None


def format_names(container: Container) -> set[str]:
    """Names of the container's format: one demuxer serves several, such as mov and mp4."""
    return set(container.format.name.split(","))


# Streams


def open_stream(
    path: str | os.PathLike, number: int | None = None
) -> tuple[InputContainer, VideoStream]:
    """Opens a container and chooses a video stream.

    Args:
        path: Path of the file.
        number: Index of the stream in `video_streams`. If None, the stream that is flagged as
            default; of several or none, the one with the largest pictures.

    Raises:
        MissingInput: If the file cannot be read.
        NotAVideo: If the file is not a video, or has no such stream.
        AudioOnly: If the file has sound but no pictures.
    """
    name = os.fspath(path)
    with named_errors(name):
        # "file:" keeps a colon in the name from being read as a protocol.
        container = av.open(f"file:{name}", options={"protocol_whitelist": "file"})
    try:
        if _NOT_VIDEO & format_names(container):
            raise NotAVideo(name, "not a video that can be read")
        streams = video_streams(container)
        if not streams and container.streams.audio:
            raise AudioOnly(name, "has sound but no picture")
        if not streams:
            raise NotAVideo(name, "has no video stream")
        if number is None:
            return container, max(streams, key=_preference)
        if not 0 <= number < len(streams):
            raise NotAVideo(
                name, f"has no video stream {number}; there are {len(streams)}, counted from 0"
            )
        return container, streams[number]
    except BaseException:
        container.close()
        raise


def video_streams(container: InputContainer) -> list[VideoStream]:
    """Video streams of a container, except cover pictures."""
    return [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]


def _preference(stream: VideoStream) -> tuple[bool, int]:
    context = stream.codec_context  # None without a decoder
    pixels = context.width * context.height if context else 0
    return bool(stream.disposition & Disposition.default), pixels


def time_base(stream: VideoStream) -> Fraction:
    """Seconds per unit of time; PyAV declares it optional, but an open stream has one."""
    assert stream.time_base is not None
    return stream.time_base


# Packets


def packets(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """Yields packets with data from the first key frame on; nothing before it can be decoded."""
    every = (packet for packet in container.demux(stream) if packet.size)
    return itertools.dropwhile(lambda packet: not packet.is_keyframe, every)


def _is_leading(packet: av.Packet, first: av.Packet) -> bool:
    """Whether a picture is shown before the first key frame.

    It then refers to pictures that were cut off, and decoders leave it out. Matroska has no times
    below zero, which is where such pictures lie.
    """
    if packet.pts is None or first.pts is None:
        return packet.pts is None and "matroska" in format_names(packet.stream.container)
    return packet.pts < first.pts


def _shown_packets(
    container: InputContainer, stream: VideoStream
) -> list[tuple[int | None, int, bool]]:
    """(time, duration, is key frame) of each frame that will be shown, in order of decoding."""
    every = packets(container, stream)
    first = packet = next(every, None)
    if first is None or packet is None:
        return []
    shown: list[tuple[int | None, int, bool]] = []
    for packet in itertools.chain([first], every):
        if not packet.is_discard and not _is_leading(packet, first):
            shown.append((packet.pts, packet.duration or 0, packet.is_keyframe))
    if shown and packet.is_corrupt:
        shown.pop()  # the demuxer ran out of data inside it
    return shown


def has_complete_index(stream: VideoStream) -> bool:
    """Whether the container lists every frame, as mp4 and avi do."""
    entries = len(stream.index_entries)
    # In avi, `frames` is a duration: dropped frames take time and have no entry. If the index is
    # missing, which comes last, there is one entry for the first frame.
    return stream.frames > 0 and (entries == stream.frames or (entries > 1 and _is_avi(stream)))


def _is_avi(stream: VideoStream) -> bool:
    return "avi" in format_names(stream.container)


def _index(stream: VideoStream) -> list:
    """Index entries of frames that will be shown, including leading ones."""
    entries = itertools.dropwhile(lambda e: not e.is_keyframe, stream.index_entries)
    return [entry for entry in entries if entry.size and not entry.is_discard]


def promised_frames(
    name: str, container: InputContainer, stream: VideoStream, number: int | None
) -> int | None:
    """Number of frames that a container states; None if it states none.

    Raises:
        TruncatedVideo: If data of some of them is missing.
    """
    if not has_complete_index(stream):
        dropped = _is_avi(stream) and not missing_data_note(name, container)
        return None if dropped else stream.frames or None
    entries = _index(stream)
    present = sum(e.pos + e.size <= container.size for e in entries)
    if present < len(entries):
        raise TruncatedVideo(
            name, f"truncated: promises {len(entries)} frames, holds {present} of them"
        )
    return len(entries) - _count_leading(name, number)


def _count_leading(name: str, number: int | None) -> int:
    container, stream = open_stream(name, number)
    with container, named_errors(name):
        every = packets(container, stream)
        first = next(every, None)  # leading pictures come right after it
        if first is None:
            return 0
        leading = itertools.takewhile(lambda packet: _is_leading(packet, first), every)
        return sum(not packet.is_discard for packet in leading)


# Times


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Display times of frames, in units of `tick` seconds.

    Attributes:
        count: Number of frames.
        times: int64 (count,), ascending; None if packets have no times or times repeat.
        keys: Times, of those in `times`, at which decoding can start.
        end: Time at which the last frame ends.
        tick: Seconds per unit of time.
    """

    count: int
    times: np.ndarray | None
    keys: np.ndarray | None
    end: int
    tick: Fraction

    def rate(self, nominal: Fraction | None) -> tuple[Fraction, bool]:
        """Frames per second, and whether the distance between frames varies.

        The rate is the nominal one if it puts every frame within half a frame of its time,
        otherwise the mean over the whole duration. The distance varies if the mean rate does not
        put every frame there, either.
        """
        times = self.times
        if times is None or not len(times) or self.end <= times[0]:
            return nominal or DEFAULT_FPS, False
        if len(times) > 1 and float(np.diff(times).max() * self.tick) > _LONGEST_GAP:
            return nominal or DEFAULT_FPS, False  # a clock that jumps tells nothing about the rate
        mean = self.count / (int(self.end - times[0]) * self.tick)
        mean = mean.limit_denominator(_LARGEST_DENOMINATOR)
        seconds = (times - times[0]) * float(self.tick)
        # A single frame fits every rate: only its duration counts.
        # Frame i of an even rate is at i / rate: half a frame off means another place.
        for rate in (nominal, mean) if len(times) > 1 else ():
            places = seconds * float(rate or 0) - np.arange(len(times))
            if rate and np.abs(places).max() <= 0.5:
                return rate, False
        return mean, len(times) > 1


def index_timeline(stream: VideoStream) -> Timeline:
    """Timeline of a container with a complete index; its times are decoding times."""
    entries = _index(stream)
    times = np.array([entry.timestamp for entry in entries], np.int64)
    end = int(times[0]) + (stream.duration or 0) if entries else 0
    return Timeline(len(entries), times, None, end, time_base(stream))


def read_timeline(path: str | os.PathLike, number: int | None = None) -> Timeline:
    """Timeline from all packets of a file; it is cached until the file changes."""
    stat = os.stat(path)
    return _read_timeline(os.fspath(path), stat.st_size, stat.st_mtime_ns, number)


@functools.lru_cache(maxsize=256)
def _read_timeline(path: str, size: int, mtime_ns: int, number: int | None) -> Timeline:
    del size, mtime_ns  # part of the cache key: a file that changed is read again
    container, stream = open_stream(path, number)
    with container, named_errors(path):
        shown = _shown_packets(container, stream)
        tick, stated = time_base(stream), _stated_end(container, stream)
    pts = [time for time, _, _ in shown]
    if not shown or None in pts or len(set(pts)) < len(pts):
        return Timeline(len(shown), None, None, 0, tick)
    times = np.sort(np.array(pts, np.int64))
    keys = np.sort(np.array([time for time, _, is_key in shown if is_key], np.int64))
    _, last, _ = max(shown)
    last = last or (int(np.median(np.diff(times))) if len(times) > 1 else 0)
    return Timeline(len(shown), times, keys, max(int(times[-1]) + last, stated), tick)


def _stated_end(container: InputContainer, stream: VideoStream) -> int:
    """End of the stream as the container states it, in units of time; 0 if it does not."""
    if stream.duration:
        return (stream.start_time or 0) + stream.duration
    return int(stream_seconds(container, stream) / time_base(stream))


def stream_seconds(container: InputContainer, stream: VideoStream) -> float:
    """Duration that a container without an index states for its video; 0 if it states none."""
    tag = stream.metadata.get("DURATION", "")  # Matroska: hours:minutes:seconds
    if match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", tag):
        hours, minutes, seconds = match.groups()
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    matroska = "matroska" in format_names(container)
    if matroska and len(container.streams) == 1 and container.duration:
        return container.duration / av.time_base
    return 0.0


# Files that are not whole


def missing_data_note(path: str | os.PathLike, container: InputContainer) -> str:
    """CUT_NOTE or HOLE_NOTE for a file whose parts do not fit together; empty if they do.

    Demuxers mistake the end of such a file for the end of the video, and skip what they cannot
    read. Parts are boxes in mp4, elements in Matroska, packets in MPEG-TS, pages in Ogg, and the
    whole file in avi and gif. Other formats are not checked, and a cut between two parts cannot be
    noticed.
    """
    size, formats = os.path.getsize(path), format_names(container)
    with open(path, "rb") as file:
        if "mpegts" in formats:
            cut = _cut_in_packet(file, size)
        elif "mp4" in formats:
            cut = _cut_in_box(file, size)
        elif "avi" in formats:
            cut = 8 + int.from_bytes(file.read(8)[4:], "little") > size
        elif "gif" in formats:
            file.seek(size - 1)
            cut = file.read(1) not in b";\0"  # the trailer, or padding after it
        elif "ogg" in formats:
            cut = _cut_in_page(file, size)
        elif "matroska" in formats:
            return _element_note(file, size)
        else:
            return ""
    return CUT_NOTE if cut else ""


def _cut_in_packet(file: BinaryIO, size: int) -> bool:
    start = file.read(256)
    for length, offset in ((188, 0), (192, 4), (204, 0)):  # plain, with times, with parity
        if start[offset : offset + 1] == start[offset + length :][:1] == b"G":  # sync bytes
            return size % length != 0
    return False


def _cut_in_box(file: BinaryIO, size: int) -> bool:
    at = 0
    while at < size:
        file.seek(at)
        header = file.read(16)
        if len(header) < 8:
            return True
        length = int.from_bytes(header[:4], "big")
        if length == 1:  # 64 bits follow the name
            length = int.from_bytes(header[8:], "big")
        if length < 8:  # 0 extends to the end of the file; other values are not boxes
            return False
        at += length
    return at > size


def _cut_in_page(file: BinaryIO, size: int) -> bool:
    at = 0
    while at < size:
        file.seek(at)
        header = file.read(27)
        segments = file.read(header[-1]) if len(header) == 27 else b""
        if len(header) < 27 or len(segments) < header[-1]:
            return True
        if header[:4] != b"OggS":
            return False
        at += 27 + len(segments) + sum(segments)
    return at > size


# Names of Matroska elements (RFC 9559): those at the top, of a segment, of a cluster.
_SEGMENT, _CLUSTER = "18538067", "1f43b675"
_ELEMENTS = frozenset(
    f"1a45dfa3 {_SEGMENT} {_CLUSTER} 114d9b74 1549a966 1654ae6b 1c53bb6b 1941a469 1043a770 1254c367"
    " ec bf e7 a3 a0 a7 ab 5854 af".split()
)


def _element_note(file: BinaryIO, size: int) -> str:
    at = 0
    while at < size:
        file.seek(at)
        header = file.read(12)
        id_bytes = 9 - header[0].bit_length()
        if not any(name.startswith(header[:id_bytes].hex()) for name in _ELEMENTS):
            return HOLE_NOTE
        if id_bytes >= len(header):
            return CUT_NOTE
        length_bytes = 9 - header[id_bytes].bit_length()
        body = id_bytes + length_bytes
        if length_bytes > 8:
            return HOLE_NOTE
        if body > len(header):
            return CUT_NOTE
        name = header[:id_bytes].hex()
        length = int.from_bytes(header[id_bytes:body], "big") & ((1 << 7 * length_bytes) - 1)
        if length == (1 << 7 * length_bytes) - 1:  # unknown, as in live streams
            length = 0
        elif at + body + length > size:
            return CUT_NOTE
        # The elements inside a segment or cluster follow one by one.
        at += body + (0 if name in (_SEGMENT, _CLUSTER) else length)
    return ""
