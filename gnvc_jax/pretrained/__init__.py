"""The models that ship with the package, and the object that users code with."""

import io
from fractions import Fraction
from pathlib import Path

import numpy as np

from gnvc_jax.bitstream import StreamReader
from gnvc_jax.coder import DEFAULT_GOP, Coder
from gnvc_jax.errors import UsageError
from gnvc_jax.model import Model, load_model

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the shipped models."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def find_model(name: str | Path) -> Model:
    """A shipped model by name, or a model file by path. FileNotFoundError, ModelCorrupt."""
    shipped = FOLDER / f"{name}.safetensors"
    if not shipped.is_file() and not Path(name).is_file():
        raise FileNotFoundError(
            f"{name}: neither a model file nor one of: {', '.join(names()) or 'none shipped'}"
        )
    return load_model(shipped if shipped.is_file() else name)


class Codec(Coder):
    """A model with `encode` and `decode` for arrays in memory; `Coder` has the streaming forms."""

    def encode(
        self, video: np.ndarray, *, qp: int = 24, fps: float | Fraction = 30, gop: int = DEFAULT_GOP
    ) -> bytes:
        """Video uint8 RGB (t, h, w, 3) -> stream. qp 0..63, lower is better.

        Raises UsageError for video of another type or shape.
        """
        if np.ndim(video) != 4 or np.shape(video)[-1] != 3:
            raise UsageError(f"video is {np.shape(video)}, expected (frames, height, width, 3)")
        rate = Fraction(fps).limit_denominator(1001)
        header = self.header(
            video.shape[2],
            video.shape[1],
            (rate.numerator, rate.denominator),
            gop=gop,
            frame_count=len(video),
        )
        out = io.BytesIO()
        self.encode_frames(video, out, header, qp)
        return out.getvalue()

    def decode(self, stream: bytes, steps: int | None = None) -> np.ndarray:
        """Stream -> video uint8 RGB (t, h, w, 3). Raises the kinds of BitstreamError.

        steps: of refinement, 0 for none; by default one if the model has a refiner.
        """
        return np.stack(list(self.decode_frames(StreamReader(stream), steps)))


def load_pretrained(name: str | Path = "small") -> Codec:
    """The codec of a shipped model ("small") or of a model file."""
    return Codec(find_model(name))
