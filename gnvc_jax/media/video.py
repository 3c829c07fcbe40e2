"""Interface of all kinds of video sources: a description, and an iterator of RGB frames.

`gnvc_jax.media.reader.open_video` returns a `VideoReader` whatever the source is. A reader collects
`Findings` while it reads: what was ignored or decided, in words for the user, and whether frames
are missing. They are complete only after the last frame, since a file is read once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np

from gnvc_jax.media.colour import Colour

DEFAULT_FPS = Fraction(25)  # for sources without a frame rate
CUT_NOTE = "the file is cut off: data is missing at its end"
HOLE_NOTE = "the file is damaged: data may be missing in it"

Crop = tuple[int, int, int, int]  # top, left, height, width


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """A video as it is shown, after rotation.

    Attributes:
        name: Path, or "-" for a pipe.
        width: Width in pixels.
        height: Height in pixels.
        fps: Mean frames per second.
        frames: Number of frames; None if it is not known in advance.
        colour: Colour space.
        bit_depth: Bits per coded sample.
        has_audio: Whether the source has audio, which is not read.
    """

    name: str
    width: int
    height: int
    fps: Fraction
    frames: int | None
    colour: Colour
    bit_depth: int
    has_audio: bool


@dataclasses.dataclass
class Findings:
    """Notes of a reader that a user should know.

    Attributes:
        notes: Lines without the name of the file.
        damaged: Whether frames are missing, or partly made up by the decoder.
    """

    notes: list[str] = dataclasses.field(default_factory=list)
    damaged: bool = False

    def note(self, text: str) -> None:
        """Adds a line, unless it is empty or already present."""
        if text and text not in self.notes:
            self.notes.append(text)

    def damage(self, text: str) -> None:
        """Adds a line, and marks the video as damaged."""
        self.damaged = True
        self.note(text)


def pixel_shape_note(aspect: Fraction | None) -> str:
    """Note on pixels that are `aspect` times as wide as high; empty if square or unknown."""
    if not aspect or aspect == 1:
        return ""
    ratio = f"{aspect.numerator}:{aspect.denominator}"
    return f"pixels are not square ({ratio}); their shape is not carried"


class VideoReader:
    """A context manager and one-shot iterator of uint8 RGB frames (h, w, 3).

    It has the attributes of `VideoInfo`, with `frame_count` for `frames`. Memory does not grow with
    the length of the video. Iterating raises TruncatedVideo after the last frame that could be
    read, if the source promised more, and DamagedVideo in place of a damaged frame.

    `notes` and `damaged` are complete after the last frame.
    """

    def __init__(
        self,
        info: VideoInfo,
        frames: Iterator[np.ndarray],
        close: Callable[[], None],
        findings: Findings | None = None,
    ):
        self.info = info
        self.name = info.name
        self.width = info.width
        self.height = info.height
        self.fps = info.fps
        self.frame_count = info.frames
        self.colour = info.colour
        self.bit_depth = info.bit_depth
        self.has_audio = info.has_audio
        self._frames = frames
        self._close = close
        self._findings = findings or Findings()

    @property
    def notes(self) -> list[str]:
        """Lines that a user should see, such as that the frame rate varies."""
        return self._findings.notes

    @property
    def damaged(self) -> bool:
        """Whether frames are missing or damaged."""
        return self._findings.damaged

    def __iter__(self) -> VideoReader:
        return self

    def __next__(self) -> np.ndarray:
        return next(self._frames)

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; iterating afterwards is an error."""
        self._close()


def crop_frame(frame: np.ndarray, crop: Crop | None) -> np.ndarray:
    """Crops (h, w, c) to (top, left, height, width); raises ValueError if it reaches outside."""
    if crop is None:
        return frame
    top, left, height, width = crop
    if min(top, left) < 0 or top + height > frame.shape[0] or left + width > frame.shape[1]:
        raise ValueError(f"crop {crop} reaches outside of {frame.shape[:2]}")
    return frame[top : top + height, left : left + width]
