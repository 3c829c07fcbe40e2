"""What every kind of video source gives: a description and an iterator of RGB frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np

from gnvc_jax.media.colour import Colour

DEFAULT_FPS = Fraction(25)  # for sources that do not say
CUT_NOTE = "the file is cut off: data is missing at its end"
HOLE_NOTE = "the file is damaged: data may be missing in it"

Crop = tuple[int, int, int, int]  # top, left, height, width


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """A video as it is shown, after rotation. `frames` is None where it is not known beforehand.

    `fps` is the mean rate, in frames a second; `bit_depth` that of the coded samples.
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
    """What a reader came across that a user should know of: lines without the file's name.

    `damaged` is true if frames are missing or partly made up by the decoder.
    """

    notes: list[str] = dataclasses.field(default_factory=list)
    damaged: bool = False

    def note(self, text: str) -> None:
        """Add a line, unless it is empty or there already."""
        if text and text not in self.notes:
            self.notes.append(text)

    def damage(self, text: str) -> None:
        self.damaged = True
        self.note(text)


def pixel_shape_note(aspect: Fraction | None) -> str:
    """What to say of pixels `aspect` times as wide as high; empty if they are square or unknown."""
    if not aspect or aspect == 1:
        return ""
    ratio = f"{aspect.numerator}:{aspect.denominator}"
    return f"pixels are not square ({ratio}); their shape is not carried"


class VideoReader:
    """A context manager and one-shot iterator of uint8 RGB frames (h, w, 3).

    Attributes are those of VideoInfo, with `frame_count` for `frames`. Memory does not grow with
    the length of the video. Iterating raises TruncatedVideo, after the last frame that could be
    read, if the source promised more, and DamagedVideo in place of a frame that is damaged.

    `notes` are lines that a user should see, such as a frame rate that varies, and `damaged` says
    whether frames are missing or damaged; both are complete after the last frame.
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
        return self._findings.notes

    @property
    def damaged(self) -> bool:
        return self._findings.damaged

    def __iter__(self) -> VideoReader:
        return self

    def __next__(self) -> np.ndarray:
        return next(self._frames)

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; iterating afterwards is an error."""
        self._close()


def crop_frame(frame: np.ndarray, crop: Crop | None) -> np.ndarray:
    """The part (top, left, height, width) of (h, w, c); ValueError if it reaches outside."""
    if crop is None:
        return frame
    top, left, height, width = crop
    if min(top, left) < 0 or top + height > frame.shape[0] or left + width > frame.shape[1]:
        raise ValueError(f"crop {crop} reaches outside of {frame.shape[:2]}")
    return frame[top : top + height, left : left + width]
