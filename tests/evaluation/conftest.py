"""A whole run of a codec of a few lines, for the tests of what is made of a run."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from gnvc_jax.evaluation.clips import Clip
from gnvc_jax.evaluation.points import CodedClip
from gnvc_jax.evaluation.quality import QualityMeter
from gnvc_jax.evaluation.sweep import Sweep
from gnvc_jax.evaluation.tables import write_results

FRAMES = 11
STREAM = Path(__file__).parents[1] / "golden/stream.gnvc"  # groups of 9 and 2 frames
HOSTILE = (
    """<img src=x onerror=alert(1)>&"' $\\frac$"""  # a clip's name, as a file system allows it
)


@dataclasses.dataclass(frozen=True)
class Quantiser:
    """Drops low bits. With none left it fails, named vae it has no file; `like`: an anchor's."""

    bits: int
    steps: int | None = None
    codec: str = "gnvc"
    like: str | None = None
    size: int | None = None

    @property
    def label(self):
        return f"{self.codec}-at-{self.like}" if self.like else f"{self.codec}{self.bits}"

    @property
    def suffix(self):
        return ".gnvc" if self.codec == "gnvc" else ".bin"

    def identity(self):
        own = (
            {"like": self.like}
            if self.like
            else {"steps": self.steps, "model": "m<1>", "model_sha256": "0" * 64}
        )
        return {"codec": self.codec, "bits": self.bits, **own}

    def code(self, clip):
        if self.bits == 0:
            raise RuntimeError("a <b>bad</b> day")
        frames = clip.frames >> (8 - self.bits) << (8 - self.bits)
        if self.codec == "vae":
            return CodedClip(frames, None)
        stream = STREAM.read_bytes() if self.bits == 6 else bytes(self.size or 300 * self.bits)
        return CodedClip(
            frames, stream, 1.5, 0.5, {"at_floor": self.bits == 4} if self.like else {}
        )


def moving_clip(name, seed=0, frames=FRAMES):
    """Smooth waves; a busy square moves from left to right in the lower half."""
    t, y, x = np.mgrid[:frames, :96, :128]
    wave = 120 + 50 * np.sin((x + 2 * t + 9 * seed) / 11) * np.cos(y / 13)
    rng = np.random.default_rng(seed)
    for k in range(frames):
        wave[k, 60:92, 8 + 4 * k : 40 + 4 * k] = rng.integers(0, 256, (32, 32))
    clip = np.stack([wave, 0.9 * wave, 255 - wave], -1).astype(np.uint8)
    return Clip(name, clip, Fraction(30000, 1001))


PAPER_ROW = {
    "figure": "BD-rate of <waves>, %",
    "published": [("GNVC-VD", -89.4), ("another", 2.0)],
    "curve": "gnvc, 5 steps",
    "measured": [-12.34, 56.0],
    "format": "+.1f",
    "note": "lowest to highest",
}


def sweep(out, clips, metrics=("psnr", "ms_ssim", "temporal")):
    """Runs all points on clips and writes results.json; returns its content."""
    points = [
        Quantiser(6, 0),
        Quantiser(3, 0),
        Quantiser(2, 1),
        Quantiser(0),
        Quantiser(7, 0, "vae"),
    ]

    def anchor(codec, like, size):
        return Quantiser(4 + (size > 1000), None, codec, like, size)

    readers = {clip.name: (lambda clip=clip: clip) for clip in clips}
    records = Sweep(out, QualityMeter(metrics)).run(readers, points, ["x264"], anchor)
    paper = {"set": "waves", "differs": ["8 frames"], "rows": [PAPER_ROW]}
    write_results(
        out, records, ["eval.py", "--data", "a b"], {"cpu": "a <cpu>", "devices": ["d"]}, paper
    )
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """(folder, results) of two clips, five points and an anchor."""
    out = tmp_path_factory.mktemp("run")
    return out, sweep(out, [moving_clip("plain"), moving_clip(HOSTILE, 1)])
