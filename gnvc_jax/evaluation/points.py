"""What a sweep measures: a clip, and the ways of coding it.

A point is one way of coding a clip at one quality. Anything with the attributes of `Point` will do.
"""

import dataclasses
import functools
import hashlib
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import safe_open

from gnvc_jax.bitstream import BitstreamError, StreamReader
from gnvc_jax.evaluation.anchors import ENCODERS, Anchor, anchor_identity
from gnvc_jax.evaluation.clips import Clip, read_clip, write_clip
from gnvc_jax.pretrained import FOLDER, load_pretrained

TOOL = (sys.executable, "-m", "gnvc_jax.cli")


class CodingError(RuntimeError):
    """A codec that failed, or that did not return the frames that went in."""


@dataclasses.dataclass(frozen=True)
class Coded:
    """A clip after coding.

    frames: (t, h, w, 3) uint8, as decoded; bitstream: the whole file, or None where there is none;
    encode_seconds, decode_seconds: wall clock or None; details: JSON-ready, for the record;
    starts: first frames of groups that were coded apart.
    """

    frames: np.ndarray
    bitstream: bytes | None
    encode_seconds: float | None = None
    decode_seconds: float | None = None
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    starts: Sequence[int] = ()


class Point(Protocol):
    """label: names the point in tables and files; suffix: of its bitstreams."""

    @property
    def label(self) -> str: ...

    @property
    def suffix(self) -> str: ...

    def identity(self) -> dict[str, Any]:
        """All that decides the result for a given clip, JSON-ready."""

    def code(self, clip: Clip) -> Coded:
        """Encodes and decodes; any exception means that the point failed."""


@dataclasses.dataclass(frozen=True)
class FilePoint:
    """A .gnvc file, written and read by separate processes of the command line tool.

    model: a name or a path; qp: 0 (best) to 63 (smallest); steps: of refinement, None for what
    `gnvc decode` does by itself; gop: frames of a group, None for what `gnvc encode` does.
    """

    model: str
    qp: int
    steps: int | None = None
    gop: int | None = None
    suffix = ".gnvc"

    @property
    def label(self) -> str:
        return f"gnvc-qp{self.qp}" + (f"-steps{self.steps}" if self.steps is not None else "")

    def identity(self) -> dict[str, Any]:
        facts = {"codec": "gnvc", "qp": self.qp, "steps": self.steps, "gop": self.gop}
        return facts | model_identity(self.model)

    def code(self, clip: Clip) -> Coded:
        bitstream, encode_seconds = _encoded(clip, self.model, self.qp, self.gop)
        with tempfile.TemporaryDirectory(prefix="gnvc-eval-") as folder:
            coded, decoded = Path(folder) / "coded.gnvc", Path(folder) / "decoded.mkv"
            coded.write_bytes(bitstream)
            steps = [] if self.steps is None else ["--steps", str(self.steps)]
            decode = ["decode", coded, decoded, "--model", self.model, *steps]
            decode_seconds = _run_tool(decode)
            frames = read_clip(decoded).frames
            starts = group_starts(coded)
        details = {"parameters": model_parameters(self.model)}
        return Coded(frames, bitstream, encode_seconds, decode_seconds, details, starts)


@dataclasses.dataclass(frozen=True)
class AutoencoderPoint:
    """The autoencoder alone, without codec, refiner and file: a ceiling of the quality."""

    model: str
    label = "vae"
    suffix = ""

    def identity(self) -> dict[str, Any]:
        return {"codec": "vae", **model_identity(self.model)}

    def code(self, clip: Clip) -> Coded:
        return Coded(np.asarray(_load_model(self.model).reconstruct(clip.frames)), None)


@dataclasses.dataclass(frozen=True)
class AnchorPoint:
    """A standard codec at the rate of another point.

    codec: 'x264' or 'x265'; like: label of the other point; target_bytes: its size.
    """

    codec: str
    like: str
    target_bytes: int

    @property
    def suffix(self) -> str:
        return f".{ENCODERS[self.codec].format}"

    @property
    def label(self) -> str:
        return f"{self.codec}-at-{self.like}"

    def identity(self) -> dict[str, Any]:
        return {
            "codec": self.codec,
            "mode": "ld",
            "tune": "visual",
            "like": self.like,
            "target_bytes": self.target_bytes,
            **anchor_identity(self.codec),
        }

    def code(self, clip: Clip) -> Coded:
        match = _anchor(self.codec, clip).match(self.target_bytes)
        result = match.result
        details = {"crf": result.crf, "command": result.command, "at_floor": match.at_floor}
        return Coded(
            result.frames, result.bitstream, result.encode_seconds, result.decode_seconds, details
        )


def group_starts(path: Path) -> list[int]:
    """First frames of the groups of a .gnvc file; empty for what is none, or not there."""
    try:
        with StreamReader(path) as reader:
            return [entry.first_frame for entry in reader.index()]
    except (FileNotFoundError, BitstreamError):
        return []


def model_identity(model: str) -> dict[str, str]:
    """Name of a shipped model or model file, and its SHA-256; FileNotFoundError."""
    path = _model_path(model)
    return {"model": path.stem, "model_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def model_parameters(model: str) -> int:
    """Numbers in VAE, codec and refiner of a model; FileNotFoundError."""
    with safe_open(_model_path(model), framework="numpy") as file:
        names = [name for name in file.keys() if name.startswith(("vae/", "codec/", "refiner/"))]
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def _model_path(model: str) -> Path:
    shipped = FOLDER / f"{model}.safetensors"
    path = shipped if shipped.is_file() else Path(model)
    if not path.is_file():
        raise FileNotFoundError(f"{model}: neither a model file nor a shipped model")
    return path


@functools.lru_cache(maxsize=1)
def _encoded(clip: Clip, model: str, qp: int, gop: int | None) -> tuple[bytes, float]:
    """The file and the seconds it took; points that differ in decoding only share it."""
    with tempfile.TemporaryDirectory(prefix="gnvc-eval-") as folder:
        source, coded = Path(folder) / "source.mkv", Path(folder) / "coded.gnvc"
        write_clip(clip, source)
        options = ["--qp", str(qp), "--model", model]
        options += [] if gop is None else ["--gop", str(gop)]
        seconds = _run_tool(["encode", source, coded, *options])
        return coded.read_bytes(), seconds


@functools.lru_cache(maxsize=1)
def _load_model(model: str):
    return load_pretrained(model)


@functools.lru_cache(maxsize=2)
def _anchor(codec: str, clip: Clip) -> Anchor:
    return Anchor(codec, clip.frames, clip.fps, clip.colour)


def _run_tool(arguments: list) -> float:
    """Runs the command line tool in a new process; the seconds it took."""
    start = time.perf_counter()
    done = subprocess.run(
        [*TOOL, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CodingError(f"gnvc {arguments[0]}: exit status {done.returncode}, {reason}")
    return time.perf_counter() - start
