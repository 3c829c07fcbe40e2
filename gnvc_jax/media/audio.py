"""The audio track of a video: packets as they are, or coded as Opus, never as samples.

`read_audio` takes a track out of a file, `AudioMuxer` puts it beside new pictures. In between it is
bytes: where it starts, and a NUT file. NUT is FFmpeg's container for packets of any codec; it keeps
exact times and costs about eight bytes per packet.
"""

from __future__ import annotations

import dataclasses
import io
import os
import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import cast

import av
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.error import InvalidDataError

from gnvc_jax.media.errors import DamagedVideo, UnsupportedFormat
from gnvc_jax.media.packets import open_stream, time_base

_START = struct.Struct("<q")  # microseconds
_OPUS_RATE = 48000  # samples per second


@dataclasses.dataclass(frozen=True)
class AudioTrack:
    """An audio track.

    Attributes:
        start: Time of its first packet in seconds, relative to the first frame; encoders may start
            a little before 0.
        nut: A NUT file with its packets, the first at time 0.
    """

    start: Fraction
    nut: bytes

    def pack(self) -> bytes:
        """Packs the track into bytes: signed 64-bit start in microseconds, then the NUT file."""
        return _START.pack(round(self.start * 1_000_000)) + self.nut

    @classmethod
    def unpack(cls, data: bytes) -> AudioTrack:
        """Unpacks a track; whether its packets can be read shows when they are written."""
        # A track that ends inside these eight bytes has no packets: any start will do for it.
        (start,) = _START.unpack(data[: _START.size].ljust(_START.size, b"\0"))
        return cls(Fraction(start, 1_000_000), data[_START.size :])


def read_audio(
    path: str | os.PathLike,
    video: int | None = None,
    bitrate: int | None = None,
    seconds: Fraction | None = None,
) -> AudioTrack | None:
    """Reads the audio track of a video file that plays by default.

    Args:
        path: A file that PyAV reads.
        video: Index of the video stream whose first frame is time 0, see `open_stream`.
        bitrate: Bits per second of Opus to code the track with; None to copy its packets.
        seconds: Packets that start later than so many seconds are left out.

    Returns:
        The track, None if there is none.

    Raises:
        MediaError: If the file cannot be read, or its audio cannot be decoded or copied.
    """
    container, pictures = open_stream(path, video)
    with container:
        source = cast(AudioStream | None, container.streams.best("audio"))
        if source is None:
            return None
        # Time 0 of the track is the first frame: a file may begin anywhere on its own clock.
        zero = (pictures.start_time or 0) * time_base(pictures)
        buffer, start = io.BytesIO(), None
        try:
            with av.open(buffer, "w", format="nut") as out:
                if bitrate is None:
                    target = out.add_stream_from_template(source)
                    found: Iterator[av.Packet] = container.demux(source)
                else:
                    target = out.add_stream("libopus", rate=_OPUS_RATE)
                    found = _opus_packets(container, source, target, bitrate)
                for packet in found:
                    # The packet that ends demuxing is empty.
                    if packet.dts is None:
                        continue
                    packet.pts = packet.dts if packet.pts is None else packet.pts
                    if start is None:
                        first, start = packet.pts, packet.pts * packet.time_base - zero
                    if seconds is not None and packet.pts * packet.time_base - zero >= seconds:
                        break
                    # NUT knows no negative times.
                    packet.pts, packet.dts = packet.pts - first, packet.dts - first
                    packet.stream = target
                    out.mux(packet)
        except InvalidDataError as error:
            raise DamagedVideo(path, f"its audio is damaged: {error.strerror}") from None
        except (ValueError, av.FFmpegError) as error:
            raise UnsupportedFormat(path, f"its audio cannot be read: {error}") from None
    return None if start is None else AudioTrack(start, buffer.getvalue())


def _opus_packets(
    container: InputContainer, source: AudioStream, target: AudioStream, bitrate: int
) -> Iterator[av.Packet]:
    """Decodes a track and codes it as Opus, mono or stereo."""
    target.layout = "mono" if source.codec_context.channels == 1 else "stereo"
    target.bit_rate = bitrate
    context = target.codec_context
    context.open()  # only then are the format and the frame size known
    resampler = av.AudioResampler(context.format, context.layout, _OPUS_RATE, context.frame_size)
    for frame in container.decode(source):
        for piece in resampler.resample(frame):
            yield from target.encode(piece)
    # None flushes: first what the resampler holds back, then what the encoder does.
    for piece in resampler.resample(None):
        yield from target.encode(piece)
    yield from target.encode(None)


class AudioMuxer:
    """Puts a track into a container with pictures, interleaved by time."""

    def __init__(self, track: AudioTrack, container: OutputContainer):
        """Adds a stream to a container that nothing was written to yet.

        Raises:
            ValueError, FFmpegError: If the track is damaged, or the container does not take its
                codec.
        """
        self._container, self._start = container, track.start
        self._source = cast(InputContainer, av.open(io.BytesIO(track.nut), format="nut"))
        if not self._source.streams.audio:
            raise ValueError("no audio")
        stream = self._source.streams.audio[0]
        self._target = container.add_stream_from_template(stream)
        self._packets = (p for p in self._source.demux(stream) if p.dts is not None)
        self._next = next(self._packets, None)

    def write_until(self, seconds: Fraction) -> None:
        """Writes the packets that start before a time."""
        while (packet := self._next) is not None:
            unit, pts = packet.time_base, cast(int, packet.pts)
            if pts * unit + self._start >= seconds:
                return
            # The track begins at 0; in the new file it begins where it did relative to frame 0.
            shift = round(self._start / unit)
            packet.pts, packet.dts = pts + shift, cast(int, packet.dts) + shift
            packet.stream = self._target
            self._container.mux(packet)
            self._next = next(self._packets, None)

    def close(self) -> None:
        """Closes the track."""
        self._source.close()
