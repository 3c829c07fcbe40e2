"""Whole models: those that ship with the package, model files and training runs.

`load_pretrained` gives a `Codec`, which turns videos in memory into streams and back;
`find_model` gives the `gnvc_jax.model.Model` behind it.
"""

import io
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float, UInt8

from gnvc_jax.bitstream import StreamReader
from gnvc_jax.buckets import as_path
from gnvc_jax.coder import DEFAULT_GOP, Coder
from gnvc_jax.decoder import DecodedGroup
from gnvc_jax.frames import check_video
from gnvc_jax.model import Model
from gnvc_jax.model_file import load_model

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the shipped models."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def is_run(path: str | os.PathLike) -> bool:
    """Whether a path is the folder of a training run."""
    return (as_path(path) / "config.json").is_file() and (as_path(path) / "checkpoints").is_dir()


def find_model(name: str | os.PathLike) -> Model:
    """Finds a model.

    Args:
        name: Name of a shipped model, model file, or folder of a run that trains a codec.

    Raises:
        FileNotFoundError: If there is none of these.
        ModelCorrupt: If the model file is damaged.
        UsageError: If the run has no codec, or no checkpoint that can be read.
    """
    shipped, path = FOLDER / f"{name}.safetensors", as_path(name)
    if shipped.is_file():
        return load_model(shipped)
    if is_run(path):
        from gnvc_jax.training.release import build_model  # coding itself needs no training

        return build_model(path, path.name)
    if not path.is_file():
        known = ", ".join(names()) or "none ships with this installation"
        raise FileNotFoundError(
            f"{name}: neither a shipped model ({known}) nor a model file nor a run folder"
        )
    return load_model(path)


class Codec(Coder):
    """A model that codes videos in memory.

    The parameters are `codec.model.vae`, `codec.model.codec` and `codec.model.refiner`, and
    `codec.functions.programs` are the pure functions that they go into. See
    `gnvc_jax.coder.Coder` for videos that come frame by frame.
    """

    def encode(
        self,
        video: UInt8[np.ndarray, "t h w 3"],
        *,
        qp: float = 24,
        fps: float | Fraction = 30,
        gop: int = DEFAULT_GOP,
        effort: int = 0,
    ) -> bytes:
        """Encodes a video.

        Args:
            video: RGB frames.
            qp: Quality level, 0 (best) to 63 (smallest), in steps of 1/8.
            fps: Frames per second.
            gop: Frames per group, 1 + 4k; each group can be decoded on its own.
            effort: 1 chooses symbols by the bits that they take, too, 0 by the error alone.

        Returns:
            The stream, what `gnvc encode` writes to a file.

        Raises:
            UsageError: If the video has another shape or type, an option is out of range, or
                `effort` is given for a model without block motion.
            LimitExceeded: If a stream cannot hold frames of this size or rate.
        """
        video = np.asarray(video)
        check_video(video)
        count, height, width, _ = video.shape
        rate = Fraction(fps).limit_denominator(1001).as_integer_ratio()
        header = self.header(width, height, rate, gop=gop, frame_count=count)
        out = io.BytesIO()
        self.encode_frames(video, out, header, qp, effort=effort)
        return out.getvalue()

    def decode(self, stream: bytes, steps: int | None = None) -> UInt8[np.ndarray, "t h w 3"]:
        """Decodes a stream.

        Args:
            stream: The stream.
            steps: Refinement steps, 0 for none; None for what the model was trained for.

        Returns:
            RGB frames.

        Raises:
            BitstreamError: If the stream is damaged, or was made with another model.
            UsageError: If steps are asked for of a model without a refiner.
        """
        return np.stack(list(self.decode_frames(StreamReader(stream), steps)))

    def decode_latents(self, stream: bytes) -> list[DecodedGroup]:
        """Decodes a stream to the latents of its groups, before refinement.

        Raises:
            BitstreamError: If the stream is damaged, or was made with another model.
        """
        reader = StreamReader(stream)
        self.check(reader.header)
        return [self.latents(reader.header, group) for group in reader.groups()]

    def refine(self, group: DecodedGroup, steps: int | None = None) -> Float[Array, "1 t h w c"]:
        """Refines the latents of a group, as `decode` does.

        Args:
            group: Latents, one of those that `decode_latents` returns.
            steps: Refinement steps, None for what the model was trained for.

        Raises:
            UsageError: If steps are asked for of a model without a refiner. Without steps, such a
                model returns the latents unchanged.
        """
        return self.functions.refine(*group, self.steps if steps is None else steps)


def load_pretrained(name: str | os.PathLike = "small") -> Codec:
    """Loads a whole codec.

    Args:
        name: Name of a shipped model, model file, or folder of a run that trains a codec.

    Raises:
        FileNotFoundError, ModelCorrupt, UsageError: See `find_model`.
    """
    return Codec(find_model(name))
