"""Standard codecs on the frames that the neural codec gets: x264, x265, SVT-AV1, VVC; low delay.

They run in the ffmpeg of imageio-ffmpeg (or $IMAGEIO_FFMPEG_EXE) with their own psychovisual tools
on, one intra frame, no reordering and no look-ahead. What is counted is the bare elementary stream
with its parameter sets, but without the encoder's settings in SEI messages and without a container,
which at low rates would cost more than some pictures.

The codecs see 8-bit YUV 4:2:0, BT.709, limited range (SVT-AV1 works in 10 bits); frames with odd
sides are padded by one replicated row or column before coding and cropped after decoding.
"""

import dataclasses
import functools
import math
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from gnvc_jax.media.colour import BT709, Colour, rgb_to_yuv420, yuv_to_rgb

TRIES = 3  # libvvenc now and then ends well with an empty file

_COLOUR_TAGS = "-color_range tv -colorspace bt709 -color_primaries bt709 -color_trc bt709".split()


@dataclasses.dataclass(frozen=True)
class Encoder:
    """options: ffmpeg's, between source and rate; format: of the elementary stream; rate: option
    that takes the rate factor; largest, step: the coarsest factor and the grid of those tried.
    """

    options: str
    format: str
    rate: str = "-crf"
    largest: float = 51.0
    step: float = 0.25


ENCODERS = {
    "x264": Encoder(
        "-c:v libx264 -preset veryslow -x264-params keyint=infinite:min-keyint=1:scenecut=0:"
        "bframes=0:rc-lookahead=0:sync-lookahead=0:mbtree=0:sliced-threads=0 "
        "-bsf:v filter_units=remove_types=6",
        "h264",
    ),
    "x265": Encoder(
        "-c:v libx265 -preset veryslow -x265-params keyint=-1:min-keyint=1:scenecut=0:bframes=0:"
        "b-adapt=0:rc-lookahead=0:cutree=0:frame-threads=1:info=0 "
        "-bsf:v filter_units=remove_types=39-40",
        "hevc",
    ),
    "svtav1": Encoder(
        "-pix_fmt yuv420p10le -c:v libsvtav1 -preset 4 "
        "-svtav1-params pred-struct=1:keyint=-1:scd=0:lookahead=0:tune=0",
        "obu",
        largest=63,
        step=1,
    ),
    "vvc": Encoder(
        "-c:v libvvenc -preset medium -qpa 1 -period 9999 "
        "-vvenc-params GopSize=8:PicReordering=0:DecodingRefreshType=0",
        "vvc",
        rate="-qp",
        largest=63,
        step=1,
    ),
}
ANCHORS = tuple(ENCODERS)


class AnchorError(RuntimeError):
    """An encoder or decoder that failed, or that did not return what went in."""


@dataclasses.dataclass(frozen=True)
class AnchorResult:
    """A coded clip.

    bitstream: the elementary stream; frames: (t, h, w, 3) uint8 decoded from it; crf: constant rate
    factor (QP of VVC); command: that encoded it, with file names without folders; version: of
    ffmpeg; encode_seconds, decode_seconds: wall clock, with process start and raw video in and out.
    """

    bitstream: bytes
    frames: np.ndarray
    crf: float
    command: str
    version: str
    encode_seconds: float
    decode_seconds: float

    @property
    def size(self) -> int:
        """Bytes of the elementary stream."""
        return len(self.bitstream)


@dataclasses.dataclass(frozen=True)
class Match:
    """The coded clip whose size is nearest to `target_bytes`; `at_floor` says that even the
    codec's coarsest setting takes more.
    """

    result: AnchorResult
    target_bytes: int
    at_floor: bool


class Anchor:
    """One codec on one clip; sizes are remembered, so that several rates can be matched cheaply."""

    def __init__(self, codec: str, frames: np.ndarray, fps: Fraction, colour: Colour = BT709):
        """codec: one of ANCHORS; frames: (t, h, w, 3) uint8; fps: frames per second; colour: of
        the YUV that is coded.

        Raises ValueError for another codec or another shape.
        """
        if codec not in ENCODERS:
            raise ValueError(f"unknown anchor '{codec}', expected one of {', '.join(ANCHORS)}")
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
            raise ValueError(f"expected (t, h, w, 3) uint8, got {frames.shape} {frames.dtype}")
        self.codec, self.fps, self.colour = codec, Fraction(fps), colour
        self.count, self.height, self.width = frames.shape[:3]
        self._raw = to_raw(frames, colour)
        self._streams: dict[float, tuple[bytes, float]] = {}

    def encode(self, crf: float) -> AnchorResult:
        """Encodes at a constant rate factor and decodes again; raises AnchorError."""
        bitstream, encode_seconds = self._stream(crf)
        start = time.perf_counter()
        frames = self._decode(bitstream)
        return AnchorResult(
            bitstream,
            frames,
            crf,
            shlex.join(["ffmpeg", *self._arguments(crf)]),
            ffmpeg_version(),
            encode_seconds,
            time.perf_counter() - start,
        )

    def match(self, target_bytes: int) -> Match:
        """The constant rate factor, on the codec's grid, whose size is nearest to a target."""
        encoder = ENCODERS[self.codec]
        crf, at_floor = bisect_crf(
            lambda crf: len(self._stream(crf)[0]), target_bytes, encoder.largest, encoder.step
        )
        return Match(self.encode(crf), target_bytes, at_floor)

    def _padded(self) -> tuple[int, int]:
        return self.height + self.height % 2, self.width + self.width % 2

    def _arguments(self, crf: float) -> list[str]:
        height, width = self._padded()
        return encode_arguments(self.codec, f"{width}x{height}", str(self.fps), f"{crf:g}")

    def _stream(self, crf: float) -> tuple[bytes, float]:
        """The elementary stream and the seconds it took."""
        if crf not in self._streams:
            output = f"coded.{ENCODERS[self.codec].format}"
            start = time.perf_counter()
            for _ in range(TRIES):
                stream = run_ffmpeg(self._arguments(crf), {"source.yuv": self._raw}, output)
                if stream:
                    break
            else:
                raise AnchorError(f"{self.codec}: the encoder wrote an empty file at crf {crf:g}")
            self._streams[crf] = stream, time.perf_counter() - start
        return self._streams[crf]

    def _decode(self, stream: bytes) -> np.ndarray:
        height, width = self._padded()
        source = f"coded.{ENCODERS[self.codec].format}"
        raw = run_ffmpeg(decode_arguments(self.codec), {source: stream}, "decoded.yuv")
        expected = self.count * height * width * 3 // 2
        if len(raw) != expected:
            raise AnchorError(
                f"{self.codec}: {self.count} frames of {width}x{height} went in, "
                f"{len(raw)} of {expected} bytes came out"
            )
        frames = _from_raw(raw, height, width, self.colour)
        return np.ascontiguousarray(frames[:, : self.height, : self.width])


def encode_arguments(codec: str, size: str, fps: str, crf: str) -> list[str]:
    """What ffmpeg is called with to encode source.yuv, of this size (WxH) and frame rate."""
    encoder = ENCODERS[codec]
    return [
        *f"-f rawvideo -pix_fmt yuv420p -s {size} -r {fps}".split(),
        *_COLOUR_TAGS,
        *"-i source.yuv".split(),
        *encoder.options.split(),
        *f"{encoder.rate} {crf}".split(),
        *_COLOUR_TAGS,
        *f"-f {encoder.format} coded.{encoder.format}".split(),
    ]


def decode_arguments(codec: str) -> list[str]:
    """What ffmpeg is called with to decode the elementary stream again."""
    form = ENCODERS[codec].format
    return (
        f"-f {form} -i coded.{form} -fps_mode passthrough -f rawvideo -pix_fmt yuv420p decoded.yuv"
    ).split()


def anchor_identity(codec: str) -> dict[str, str | list[float]]:
    """All that decides what a codec makes of given frames at a given size, JSON-ready.

    The whole commands, with names in place of what depends on the clip and on the size that is to
    be matched; the grid of rate factors; the version of ffmpeg.
    """
    return {
        "encode": shlex.join(encode_arguments(codec, "SIZE", "FPS", "CRF")),
        "decode": shlex.join(decode_arguments(codec)),
        "grid": [ENCODERS[codec].largest, ENCODERS[codec].step],
        "ffmpeg": ffmpeg_version(),
    }


def encode_anchor(codec: str, frames: np.ndarray, fps: Fraction, crf: float) -> AnchorResult:
    """Encodes (t, h, w, 3) uint8 RGB with one of ANCHORS at a constant rate factor.

    Raises ValueError for wrong input and AnchorError where the codec fails.
    """
    return Anchor(codec, frames, fps).encode(crf)


def match_rate(codec: str, frames: np.ndarray, fps: Fraction, target_bytes: int) -> Match:
    """Encodes as `encode_anchor` does, as near as it gets to a size in bytes."""
    return Anchor(codec, frames, fps).match(target_bytes)


def bisect_crf(
    size: Callable[[float], int],
    target: int,
    largest: float = 51.0,
    step: float = 0.25,
    tolerance: float = 0.005,
) -> tuple[float, bool]:
    """Finds the constant rate factor whose size is nearest to a target, in log size.

    Args:
        size: bytes at a factor in 0..largest, falling in it.
        target: bytes wanted.
        largest, step: of the grid of factors.
        tolerance: relative error at which the search ends early.

    Returns:
        The factor, and whether the size at the largest one is still above the target.
    """
    if target <= 0:
        raise ValueError(f"target of {target} bytes")
    errors = {largest: math.log(size(largest) / target)}
    if errors[largest] > 0:
        return largest, True
    low, high = 0, round(largest / step)  # too large or untried, too small
    while high - low > 1 and min(map(abs, errors.values())) > tolerance:
        middle = (low + high) // 2
        crf = middle * step
        errors[crf] = math.log(size(crf) / target)
        low, high = (middle, high) if errors[crf] > 0 else (low, middle)
    return min(errors, key=lambda crf: abs(errors[crf])), False


@functools.cache
def ffmpeg_version() -> str:
    """The version that ffmpeg names itself, such as 'n9.0.2'."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[2]


def run_ffmpeg(arguments: list[str], inputs: dict[str, bytes], output: str) -> bytes:
    """Runs ffmpeg in a folder that holds the input files; the bytes of `output`. AnchorError."""
    with tempfile.TemporaryDirectory(prefix="gnvc-anchor-") as folder:
        for name, data in inputs.items():
            (Path(folder) / name).write_bytes(data)
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise AnchorError(f"ffmpeg: exit status {done.returncode}, {reason}")
        path = Path(folder) / output
        return path.read_bytes() if path.exists() else b""


def to_raw(frames: np.ndarray, colour: Colour = BT709) -> bytes:
    """(t, h, w, 3) uint8 RGB to planar YUV 4:2:0 with even sides."""
    even = [(0, side % 2) for side in frames.shape[1:3]]
    return b"".join(
        plane.tobytes()
        for frame in frames
        for plane in rgb_to_yuv420(np.pad(frame, (*even, (0, 0)), mode="edge"), colour)
    )


def _from_raw(raw: bytes, height: int, width: int, colour: Colour) -> np.ndarray:
    """The inverse of `to_raw`, for even sides, apart from what 4:2:0 loses."""
    luma, chroma = height * width, height * width // 4
    samples = np.frombuffer(raw, np.uint8).reshape(-1, luma + 2 * chroma)
    half = (height // 2, width // 2)
    return np.stack(
        [
            yuv_to_rgb(
                frame[:luma].reshape(height, width),
                frame[luma:-chroma].reshape(half),
                frame[-chroma:].reshape(half),
                colour,
            )
            for frame in samples
        ]
    )
