"""Encoding to a target: a size, a rate or a quality that the whole video must have.

A `Target` is what a user asks for. `encode_to_target` encodes the video at one level after another,
constant for the whole of it, and searches for the level that meets the target by real files. All
parts of a video thus have the same quality, which is the best use of its bits.
"""

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, Literal

import jax
import numpy as np

from gnvc_jax.analysis import Analysis
from gnvc_jax.bitstream import Header, StreamReader
from gnvc_jax.codec.config import MIXED
from gnvc_jax.coder import MAX_QP, Coder, Progress
from gnvc_jax.errors import UsageError
from gnvc_jax.frames import to_float
from gnvc_jax.metrics.backbones import MIN_SIDE, load_weights
from gnvc_jax.metrics.lpips import lpips
from gnvc_jax.metrics.psnr import psnr

Kind = Literal["bitrate", "bpp", "size", "psnr", "lpips"]
Frames = Callable[[], Iterable[np.ndarray]]  # reads the video once more
Begin = Callable[[str], Progress]  # called with what begins now

FIRST_QP = 32
LAST = MIXED * MAX_QP


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a kind of target is met.

    The surplus of a stream is how much better, and thus larger, it is than the target asks for:
    a difference in dB for PSNR, and of logarithms otherwise. It falls with qp.

    Attributes:
        low, high: Surplus with which the search ends.
        least, most: Surplus that is accepted at the best and at the worst level.
        slope: Typical change of the surplus from one level to the next, measured on the shipped
            model, where nothing else is known.
        text: Format of a value.
        scale: What a value is divided by for `text`.
    """

    low: float
    high: float
    least: float
    most: float
    slope: float
    text: str
    scale: float = 1.0

    def allows(self, surplus: float) -> bool:
        """Whether a surplus is accepted."""
        return self.least <= surplus <= self.most

    def format(self, value: float) -> str:
        """A value as text, with its unit."""
        return self.text.format(value / self.scale)


RULES: dict[str, Rule] = {
    # Rates are met from both sides, a size is never exceeded, and a quality is at least reached.
    "bitrate": Rule(-0.01, 0.01, -0.03, 0.03, -0.08, "{:.2f} kb/s", 1000.0),
    "bpp": Rule(-0.01, 0.01, -0.03, 0.03, -0.08, "{:.5f} bpp"),
    "size": Rule(-0.02, 0.0, -math.inf, 0.0, -0.08, "{:.0f} bytes"),
    "psnr": Rule(0.0, 0.05, 0.0, math.inf, -0.2, "{:.2f} dB"),
    "lpips": Rule(0.0, 0.02, 0.0, math.inf, -0.04, "LPIPS {:.4f}"),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """What a stream is to be like.

    Attributes:
        kind: "bitrate" in bits per second, "bpp" in bits per pixel, "size" in bytes at most,
            "psnr" in dB at least, or "lpips" at most; quality is that of the video that a decoder
            gives, with refinement, as the mean over its frames.
        value: The value.

    Raises:
        UsageError: If the value is not positive and finite.
    """

    kind: Kind
    value: float

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf:
            raise UsageError(f"a target must be a positive number, got {self.value:g}")

    @property
    def rule(self) -> Rule:
        """How this kind of target is met."""
        return RULES[self.kind]

    def __str__(self) -> str:
        return self.rule.format(self.value)

    def bitrate(self, header: Header) -> float:
        """Bits per second of a target of the kinds "bitrate" and "bpp"."""
        if self.kind == "bitrate":
            return self.value
        return self.value * header.width * header.height * header.fps[0] / header.fps[1]

    def surplus(self, value: float) -> float:
        """How much better or larger than asked for a value is, see `Rule`."""
        if self.kind == "psnr":
            return value - self.value
        ratio = math.log(max(value, 1e-9) / self.value)
        return -ratio if self.kind == "lpips" else ratio


@dataclasses.dataclass(eq=False)
class Trial:
    """A stream that was encoded at some level.

    Attributes:
        qp: Level of the stream.
        file: Temporary file with the stream, removed when it is closed.
        frames: Number of frames.
        value: Value of the kind that is searched for.
        surplus: Its surplus over the target.
    """

    qp: float
    file: BinaryIO
    frames: int
    value: float
    surplus: float

    @property
    def size(self) -> int:
        """Size of the stream in bytes."""
        return self.file.seek(0, 2)


def encode_to_target(
    coder: Coder,
    frames: Frames,
    header: Header,
    target: Target,
    begin: Begin = lambda text: lambda n: None,
    *,
    scene_cuts: bool = True,
    audio: bytes = b"",
    effort: int = 0,
) -> Trial:
    """Encodes a video at the level that meets a target.

    Args:
        coder: Encoder.
        frames: Function that reads the frames from the beginning; it is called for each pass.
        header: Header of the stream.
        target: What the stream is to be like.
        begin: Called at the beginning of each pass with what it does; returns a function that is
            called with the number of new frames whenever some are finished.
        scene_cuts: See `Coder.encode_frames`.
        audio: Audio track for the stream. It counts for a size; a rate is that of the pictures.
        effort: See `Coder.encode_frames`.

    Returns:
        The stream. A rate is met within 1 % where one of the 505 levels allows it, else by the
        nearest one.

    Raises:
        UsageError: If the target cannot be met, with the nearest that can, or the metric cannot be
            computed. The other errors are those of `Coder.encode_frames`.
    """
    if target.kind == "lpips" and min(header.width, header.height) < MIN_SIDE:
        raise UsageError(
            f"LPIPS needs frames of at least {MIN_SIDE}x{MIN_SIDE} pixels, got "
            f"{header.width}x{header.height}"
        )
    analysis = Analysis()

    def attempt(qp: float) -> Trial:
        file = tempfile.TemporaryFile()
        progress = begin(f"encoding at qp {qp:g}")
        options: dict[str, Any] = {"scene_cuts": scene_cuts, "audio": audio, "effort": effort}
        given = frames(), file, header, qp, progress
        count = coder.encode_frames(*given, analysis=analysis, **options)
        value = measure(coder, frames, header, target.kind, file, count, begin, len(audio))
        return Trial(qp, file, count, value, target.surplus(value))

    trial = search(attempt, target.rule)
    if trial.qp in (0, MAX_QP) and not target.rule.allows(trial.surplus):
        trial.file.close()
        found = target.rule.format(trial.value)
        raise UsageError(f"{target} cannot be met; the nearest is {found}, with --qp {trial.qp:g}")
    return trial


def search(attempt: Callable[[float], Trial], rule: Rule) -> Trial:
    """Searches for the level whose stream meets a target, by regula falsi.

    Args:
        attempt: Encodes at a level between 0 and 63, in steps of 1/8.
        rule: How the target is met.

    Returns:
        The first stream whose surplus is within the rule. If there is none, then of the two
        neighbouring levels that enclose it the one that the rule allows, or the nearer one. If the
        levels do not enclose it, the stream at the end that is nearest.
    """
    aim, slope = (rule.low + rule.high) / 2, rule.slope
    # The largest level that is too good, and the smallest that is not good enough, so far.
    over: Trial | None = None
    under: Trial | None = None
    step, width = MIXED * FIRST_QP, LAST
    while True:
        trial = attempt(step / MIXED)
        if rule.low <= trial.surplus <= rule.high:
            _close(over, under)
            return trial
        before = over or under  # for the slope, while only one side is known
        if before is not None and trial.qp != before.qp:
            measured = (trial.surplus - before.surplus) / (trial.qp - before.qp)
            # Files do not grow with qp, or hardly; a slope of nothing would lead anywhere.
            slope = min(measured, rule.slope / 4)
        if trial.surplus > rule.high:
            _close(over)
            over = trial
        else:
            _close(under)
            under = trial
        # The aim is not enclosed yet: move towards it by the slope, at least by one step.
        if over is None or under is None:
            end = LAST if under is None else 0
            if step == end:
                return trial
            move = round(MIXED * (aim - trial.surplus) / slope) or (1 if under is None else -1)
            step = min(max(step + move, 0), LAST)
            continue
        low, high = round(MIXED * over.qp), round(MIXED * under.qp)
        if high - low <= 1:
            break
        # Regula falsi: where the line through both would cross the aim.
        share = (over.surplus - aim) / (over.surplus - under.surplus)
        step = round(low + share * (high - low))
        if high - low > width / 2:  # interpolation hardly narrows the interval: halve it
            step = (low + high) // 2
        step, width = min(max(step, low + 1), high - 1), high - low
    # Neighbouring levels: nothing lies between them.
    best = min((over, under), key=lambda t: (not rule.allows(t.surplus), abs(t.surplus)))
    _close(under if best is over else over)
    return best


def _close(*trials: Trial | None) -> None:
    for trial in trials:
        if trial is not None:
            trial.file.close()


def measure(
    coder: Coder,
    frames: Frames,
    header: Header,
    kind: Kind,
    file: BinaryIO,
    count: int,
    begin: Begin,
    audio: int,
) -> float:
    """Measures a stream.

    Args:
        coder: Decoder.
        frames: Function that reads the source.
        header: Header of the stream.
        kind: What to measure, see `Target`.
        file: The stream.
        count: Number of its frames.
        begin: See `encode_to_target`.
        audio: Bytes of audio in the stream.
    """
    size = file.seek(0, 2)
    if kind == "size":
        return size
    # Rates are those of the pictures; a size is that of the whole file.
    size -= audio
    if kind == "bitrate":
        return 8 * size * header.fps[0] / header.fps[1] / count
    if kind == "bpp":
        return 8 * size / (count * header.width * header.height)
    file.seek(0)
    metric, progress, values = frame_metric(kind), begin(f"measuring {kind.upper()}"), []
    for x, y in zip(frames(), coder.decode_frames(StreamReader(file))):
        # Frame by frame: neither video need fit into memory.
        values.append(float(metric(x[None], y[None])[0]))
        progress(1)
    return float(np.mean(values))


@functools.cache
def frame_metric(kind: Literal["psnr", "lpips"]) -> Callable[..., jax.Array]:
    """Metric of two batches of uint8 frames: PSNR of RGB in dB, or LPIPS with AlexNet.

    Raises:
        FileNotFoundError: If the weights of LPIPS are not installed.
    """
    if kind == "psnr":
        return jax.jit(psnr)
    distance = jax.jit(lambda weights, x, y: lpips(weights, to_float(x), to_float(y)))
    return functools.partial(distance, load_weights("alex"))
