"""Points of a sweep: ways of coding a clip, each at one quality.

`FilePoint` is our codec, `AutoencoderPoint` the autoencoder without a file, and `AnchorPoint` a
standard codec at the rate of another point. Anything with the attributes of `Point` works, too.
"""

import dataclasses
import functools
import hashlib
import itertools
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
from gnvc_jax.pretrained import FOLDER, Codec, load_pretrained

# By the module, not the script `gnvc`: this interpreter, whatever PATH says.
TOOL = (sys.executable, "-m", "gnvc_jax.cli")


class CodingError(RuntimeError):
    """A codec that failed, or whose output does not have the shape of its input."""


@dataclasses.dataclass(frozen=True)
class CodedClip:
    """A clip after coding.

    Attributes:
        frames: Decoded frames, (t, h, w, 3) uint8.
        bitstream: The whole file, or None if there is none.
        encode_seconds: Wall-clock time to encode, or None.
        decode_seconds: Wall-clock time to decode, or None.
        details: Facts for the record, JSON-ready.
        starts: First frames of groups that were coded independently.
    """

    frames: np.ndarray
    bitstream: bytes | None
    encode_seconds: float | None = None
    decode_seconds: float | None = None
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    starts: Sequence[int] = ()


class Point(Protocol):
    """One way of coding a clip at one quality."""

    @property
    def label(self) -> str:
        """Name of the point in tables and files."""
        ...

    @property
    def suffix(self) -> str:
        """Suffix of the files it writes."""
        ...

    def identity(self) -> dict[str, Any]:
        """Everything that determines the result for a given clip, JSON-ready."""
        ...

    def code(self, clip: Clip) -> CodedClip:
        """Encodes and decodes a clip; any exception means that the point failed."""
        ...


@dataclasses.dataclass(frozen=True)
class FilePoint:
    """A .gnvc file, written and read by separate processes of `gnvc`.

    Attributes:
        model: Name of a shipped model, or path of a model file.
        qp: Quality level from 0 (best) to 63 (smallest).
        steps: Refinement steps, None for the default of `gnvc decode`.
        gop: Frames per group, None for the default of `gnvc encode`.
        refiner: Refiner in place of the model's, as `gnvc decode --refiner` takes it.
        t_start: Flow time at which that refiner begins, None for its default.
    """

    model: str
    qp: int
    steps: int | None = None
    gop: int | None = None
    refiner: str | None = None
    t_start: float | None = None
    suffix = ".gnvc"

    @property
    def label(self) -> str:
        """Name of the point in tables and files."""
        return f"gnvc-qp{self.qp}" + (f"-steps{self.steps}" if self.steps is not None else "")

    def identity(self) -> dict[str, Any]:
        """Everything that determines the result for a given clip, JSON-ready."""
        facts = {"codec": "gnvc", "qp": self.qp, "steps": self.steps, "gop": self.gop}
        if self.refiner is not None:
            facts |= {"refiner": refiner_identity(self.refiner), "t_start": self.t_start}
        return facts | model_identity(self.model)

    def code(self, clip: Clip) -> CodedClip:
        """Encodes and decodes a clip."""
        bitstream, encode_seconds = _encoded(clip, self.model, self.qp, self.gop)
        with tempfile.TemporaryDirectory(prefix="gnvc-eval-") as folder:
            coded, decoded = Path(folder) / "coded.gnvc", Path(folder) / "decoded.mkv"
            # Written again: points that share the encoding have a folder each.
            coded.write_bytes(bitstream)
            options = {"steps": self.steps, "refiner": self.refiner, "t-start": self.t_start}
            given = [[f"--{k}", v] for k, v in options.items() if v is not None]
            # .mkv is lossless here: the frames that are measured are those of the decoder, to the
            # bit.
            decode = ["decode", coded, decoded, "--model", self.model, *itertools.chain(*given)]
            decode_seconds = _run_tool(decode)
            frames = read_clip(decoded).frames
            starts = group_starts(coded)
        details = {"parameters": model_parameters(self.model, self.refiner is None)}
        return CodedClip(frames, bitstream, encode_seconds, decode_seconds, details, starts)


@dataclasses.dataclass(frozen=True)
class AutoencoderPoint:
    """The autoencoder alone, without codec, refiner and file: an upper bound of the quality."""

    model: str
    label = "vae"
    suffix = ""

    def identity(self) -> dict[str, Any]:
        """Everything that determines the result for a given clip, JSON-ready."""
        return {"codec": "vae", **model_identity(self.model)}

    def code(self, clip: Clip) -> CodedClip:
        """Encodes and decodes a clip."""
        # No file, hence no rate: tables show the quality alone.
        return CodedClip(np.asarray(_load_model(self.model).reconstruct(clip.frames)), None)


@dataclasses.dataclass(frozen=True)
class AnchorPoint:
    """A standard codec at the rate of another point.

    Attributes:
        codec: One of `anchors.ANCHORS`.
        like: Label of the other point.
        target_bytes: Size of its file.
    """

    codec: str
    like: str
    target_bytes: int

    @property
    def suffix(self) -> str:
        """Suffix of the elementary stream."""
        return f".{ENCODERS[self.codec].format}"

    @property
    def label(self) -> str:
        """Name of the point in tables and files."""
        return f"{self.codec}-at-{self.like}"

    def identity(self) -> dict[str, Any]:
        """Everything that determines the result for a given clip, JSON-ready."""
        return {
            "codec": self.codec,
            "mode": "ld",
            "tune": "visual",
            "like": self.like,
            "target_bytes": self.target_bytes,
            **anchor_identity(self.codec),
        }

    def code(self, clip: Clip) -> CodedClip:
        """Encodes and decodes a clip."""
        # The rate factor whose file is nearest in size; it depends on the clip.
        match = _anchor(self.codec, clip).match(self.target_bytes)
        result = match.result
        details = {"crf": result.crf, "command": result.command, "at_floor": match.at_floor}
        return CodedClip(
            result.frames, result.bitstream, result.encode_seconds, result.decode_seconds, details
        )


def group_starts(path: Path) -> list[int]:
    """First frames of the groups of a .gnvc file; empty for any other or a missing file."""
    try:
        with StreamReader(path) as reader:
            return [entry.first_frame for entry in reader.index()]
    except (FileNotFoundError, BitstreamError):
        return []


def model_identity(model: str) -> dict[str, str]:
    """Finds name and SHA-256 of a shipped model or model file.

    Raises:
        FileNotFoundError: If there is no such model.
    """
    path = _model_path(model)
    return {"model": path.stem, "model_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def refiner_identity(refiner: str) -> str:
    """SHA-256 of a model file; for a folder, of the names, sizes and times of its files.

    The weights in a folder may take tens of gigabytes, which are not read for every record.

    Raises:
        FileNotFoundError: If there is neither.
    """
    # A ported DiT is a folder; anything else is a model file or the name of one.
    if not Path(refiner).is_dir():
        return model_identity(refiner)["model_sha256"]
    files = [(path, path.stat()) for path in sorted(Path(refiner).rglob("*")) if path.is_file()]
    text = "".join(f"{path} {stat.st_size} {stat.st_mtime_ns}\n" for path, stat in files)
    return hashlib.sha256(text.encode()).hexdigest()


def model_parameters(model: str, refiner: bool = True) -> int:
    """Counts the parameters in VAE, codec and, unless it is left out, refiner of a model.

    Raises:
        FileNotFoundError: If there is no such model.
    """
    parts = ("vae/", "codec/", *["refiner/"] * refiner)
    with safe_open(_model_path(model), framework="numpy") as file:
        # Shapes are in the header of the file; no tensor is read.
        names = [name for name in file.keys() if name.startswith(parts)]
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def _model_path(model: str) -> Path:
    shipped = FOLDER / f"{model}.safetensors"
    path = shipped if shipped.is_file() else Path(model)
    if not path.is_file():
        raise FileNotFoundError(f"{model}: neither a model file nor a shipped model")
    return path


# Points of one level with different refinement steps come one after another: one entry is enough.
@functools.lru_cache(maxsize=1)
def _encoded(clip: Clip, model: str, qp: int, gop: int | None) -> tuple[bytes, float]:
    """Encoded file, and seconds it took; points that differ only in decoding share them."""
    with tempfile.TemporaryDirectory(prefix="gnvc-eval-") as folder:
        source, coded = Path(folder) / "source.mkv", Path(folder) / "coded.gnvc"
        write_clip(clip, source)
        options = ["--qp", str(qp), "--model", model]
        options += [] if gop is None else ["--gop", str(gop)]
        # A process of its own, so that the time includes start and compilation, as for users.
        seconds = _run_tool(["encode", source, coded, *options])
        return coded.read_bytes(), seconds


@functools.lru_cache(maxsize=1)
def _load_model(model: str) -> Codec:
    return load_pretrained(model)


# An anchor remembers the rate factors it tried, which all points of a clip share.
@functools.lru_cache(maxsize=2)
def _anchor(codec: str, clip: Clip) -> Anchor:
    return Anchor(codec, clip.frames, clip.fps, clip.colour)


def _run_tool(arguments: list) -> float:
    """Runs `gnvc` in a new process; returns the seconds it took.

    Raises:
        CodingError: If it fails.
    """
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
