"""Standard codecs on the same frames as the neural codec: x264, x265, SVT-AV1, VVC; low delay.

They run in the ffmpeg of imageio-ffmpeg (or $IMAGEIO_FFMPEG_EXE) with their psychovisual tools on,
one intra frame, no reordering and no look-ahead. The size is that of the bare elementary stream
with its parameter sets, without the encoder's settings in SEI messages and without a container,
which at low rates would take more bytes than some pictures.

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

TRIES = 3  # libvvenc occasionally succeeds with an empty file

# Given for input and output: ffmpeg would otherwise convert or guess.
_COLOUR_TAGS = "-color_range tv -colorspace bt709 -color_primaries bt709 -color_trc bt709".split()


@dataclasses.dataclass(frozen=True)
class AnchorEncoder:
    """How to call an encoder.

    Attributes:
        options: Options of ffmpeg between the source and the rate.
        format: Format of the elementary stream.
        rate: Option that takes the rate factor.
        largest: Coarsest rate factor.
        step: Distance between the rate factors that are tried.
    """

    options: str
    format: str
    rate: str = "-crf"
    largest: float = 51.0
    step: float = 0.25


# Low delay: no look-ahead, and in x264 and x265 nothing that needs it or B frames (mbtree, cutree).
# Filters drop SEI units, which are of type 6 in H.264, 39 and 40 in HEVC; they hold the encoder's
# settings. pred-struct=1 is the low delay of SVT-AV1, tune=0 its visual quality; -qpa 1 is the
# perceptual quantisation of VVenC.
ENCODERS = {
    "x264": AnchorEncoder(
        "-c:v libx264 -preset veryslow -x264-params keyint=infinite:min-keyint=1:scenecut=0:"
        "bframes=0:rc-lookahead=0:sync-lookahead=0:mbtree=0:sliced-threads=0 "
        "-bsf:v filter_units=remove_types=6",
        "h264",
    ),
    "x265": AnchorEncoder(
        "-c:v libx265 -preset veryslow -x265-params keyint=-1:min-keyint=1:scenecut=0:bframes=0:"
        "b-adapt=0:rc-lookahead=0:cutree=0:frame-threads=1:info=0 "
        "-bsf:v filter_units=remove_types=39-40",
        "hevc",
    ),
    "svtav1": AnchorEncoder(
        "-pix_fmt yuv420p10le -c:v libsvtav1 -preset 4 "
        "-svtav1-params pred-struct=1:keyint=-1:scd=0:lookahead=0:tune=0",
        "obu",
        largest=63,
        step=1,
    ),
    "vvc": AnchorEncoder(
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
    """A clip coded by a standard codec.

    Attributes:
        bitstream: Elementary stream.
        frames: Decoded frames, (t, h, w, 3) uint8.
        crf: Constant rate factor (QP for VVC).
        command: Command that encoded it, with file names without folders.
        version: Version of ffmpeg.
        encode_seconds: Wall-clock time to encode, including process start and raw video.
        decode_seconds: Wall-clock time to decode, likewise.
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
    """The coded clip whose size is closest to a target.

    Attributes:
        result: Coded clip.
        target_bytes: Target.
        at_floor: Whether even the coarsest setting of the codec takes more.
    """

    result: AnchorResult
    target_bytes: int
    at_floor: bool


class Anchor:
    """One codec on one clip; streams are kept, so that several rates can be matched cheaply."""

    def __init__(self, codec: str, frames: np.ndarray, fps: Fraction, colour: Colour = BT709):
        """Prepares the frames.

        Args:
            codec: One of ANCHORS.
            frames: (t, h, w, 3) uint8.
            fps: Frames per second.
            colour: Colour space of the YUV that is coded.

        Raises:
            ValueError: If the results are of another codec or of another shape.
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
        # Kept from the search; the time is that of the first encoding.
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
        """Encodes at the rate factor whose size is closest to a target; raises AnchorError."""
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
        """Elementary stream, and seconds it took to encode."""
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
        # 4:2:0 has one sample of u and one of v for four of luma: 3/2 bytes per pixel.
        expected = self.count * height * width * 3 // 2
        if len(raw) != expected:
            raise AnchorError(
                f"{self.codec}: {self.count} frames of {width}x{height} went in, "
                f"{len(raw)} of {expected} bytes came out"
            )
        frames = _from_raw(raw, height, width, self.colour)
        return np.ascontiguousarray(frames[:, : self.height, : self.width])


def encode_arguments(codec: str, size: str, fps: str, crf: str) -> list[str]:
    """Arguments of ffmpeg to encode source.yuv, of this size (WxH) and frame rate."""
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
    """Arguments of ffmpeg to decode the elementary stream."""
    form = ENCODERS[codec].format
    return (
        f"-f {form} -i coded.{form} -fps_mode passthrough -f rawvideo -pix_fmt yuv420p decoded.yuv"
    ).split()


def anchor_identity(codec: str) -> dict[str, str | list[float]]:
    """Everything that determines the result for given frames and a given size, JSON-ready.

    That is the commands, with placeholders for what depends on the clip and on the size to match,
    the grid of rate factors, and the version of ffmpeg.
    """
    return {
        "encode": shlex.join(encode_arguments(codec, "SIZE", "FPS", "CRF")),
        "decode": shlex.join(decode_arguments(codec)),
        "grid": [ENCODERS[codec].largest, ENCODERS[codec].step],
        "ffmpeg": ffmpeg_version(),
    }


def encode_anchor(codec: str, frames: np.ndarray, fps: Fraction, crf: float) -> AnchorResult:
    """Encodes (t, h, w, 3) uint8 RGB with one of ANCHORS at a constant rate factor.

    Raises:
        ValueError: If the input is wrong.
        AnchorError: If the codec fails.
    """
    return Anchor(codec, frames, fps).encode(crf)


def match_rate(codec: str, frames: np.ndarray, fps: Fraction, target_bytes: int) -> Match:
    """Encodes as `encode_anchor` does, as close as possible to a size in bytes."""
    return Anchor(codec, frames, fps).match(target_bytes)


def bisect_crf(
    size: Callable[[float], int],
    target: int,
    largest: float = 51.0,
    step: float = 0.25,
    tolerance: float = 0.005,
) -> tuple[float, bool]:
    """Finds the constant rate factor whose size is closest to a target, in log size.

    Args:
        size: Function from a factor in [0, largest] to bytes; it decreases.
        target: Target in bytes.
        largest: Largest factor.
        step: Distance between factors.
        tolerance: Relative error at which the search ends early.

    Returns:
        The factor, and whether the size at the largest one is still above the target.

    Raises:
        ValueError: If the target is not positive.
    """
    if target <= 0:
        raise ValueError(f"target of {target} bytes")
    # Logarithms make a file of half the size as far away as one of twice the size.
    errors = {largest: math.log(size(largest) / target)}
    if errors[largest] > 0:
        return largest, True
    # Bisection over whole numbers of steps; sizes fall as the factor grows.
    low, high = 0, round(largest / step)  # too large or untried, too small
    while high - low > 1 and min(map(abs, errors.values())) > tolerance:
        middle = (low + high) // 2
        crf = middle * step
        errors[crf] = math.log(size(crf) / target)
        low, high = (middle, high) if errors[crf] > 0 else (low, middle)
    return min(errors, key=lambda crf: abs(errors[crf])), False


@functools.cache
def ffmpeg_version() -> str:
    """Version of ffmpeg, such as 'n9.0.2'."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[2]


def run_ffmpeg(arguments: list[str], inputs: dict[str, bytes], output: str) -> bytes:
    """Runs ffmpeg in a temporary folder.

    Args:
        arguments: Arguments of ffmpeg.
        inputs: Input files by name.
        output: Name of the output file.

    Returns:
        Contents of the output file; empty if there is none.

    Raises:
        AnchorError: If ffmpeg fails.
    """
    with tempfile.TemporaryDirectory(prefix="gnvc-anchor-") as folder:
        for name, data in inputs.items():
            (Path(folder) / name).write_bytes(data)
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
        if done.returncode:
            # The last line says why; those above it are of single frames or options.
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise AnchorError(f"ffmpeg: exit status {done.returncode}, {reason}")
        path = Path(folder) / output
        return path.read_bytes() if path.exists() else b""


def to_raw(frames: np.ndarray, colour: Colour = BT709) -> bytes:
    """Converts (t, h, w, 3) uint8 RGB to planar YUV 4:2:0, padded to even sides."""
    # 4:2:0 needs even sides; the decoder crops again.
    even = [(0, side % 2) for side in frames.shape[1:3]]
    return b"".join(
        plane.tobytes()
        for frame in frames
        for plane in rgb_to_yuv420(np.pad(frame, (*even, (0, 0)), mode="edge"), colour)
    )


def _from_raw(raw: bytes, height: int, width: int, colour: Colour) -> np.ndarray:
    """Inverts `to_raw` for even sides, apart from what 4:2:0 subsampling loses."""
    # Per frame: all of y, then all of u, then all of v.
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
