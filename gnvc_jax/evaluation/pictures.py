"""Pictures that a sweep keeps for the report: a few frames, and one row of pixels over time.

OUT/pictures/CLIP__source/view.json     what is kept of the clip, chosen from the source alone
OUT/pictures/CLIP__source/0048.png      a frame of the source, OUT/pictures/CLIP__POINT of a point
OUT/pictures/CLIP__source/slice.png     row y of every frame, one below the other: (t, w)
"""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import uniform_filter

from gnvc_jax.evaluation.clips import Clip
from gnvc_jax.files import write_json, write_whole

SOURCE = "source"


@dataclasses.dataclass(frozen=True)
class View:
    """Frames and enlarged square of a clip that the report shows.

    Attributes:
        frames: Indices of whole frames.
        top: Top of the square that is shown enlarged, in pixels.
        left: Left side of the square.
        side: Side of the square.
        row: Row of pixels that is shown over time.
    """

    frames: tuple[int, ...]
    top: int
    left: int
    side: int
    row: int

    @property
    def middle(self) -> int:
        """Position in `frames` of the frame that the square is taken from."""
        return len(self.frames) // 2

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files kept for every point."""
        return (*(f"{index:04d}.png" for index in self.frames), "slice.png")


def choose_view(frames: np.ndarray) -> View:
    """Chooses three frames, and the square with most texture and motion in the middle one.

    The side of the square is a quarter of the shorter side of the frame, but at least 64 pixels if
    the frame allows. The square is where the variance of luma plus the mean squared change to the
    next frame is largest, so that difficult content is chosen before anything is coded.

    Args:
        frames: Source, (t, h, w, 3) uint8.
    """
    t, h, w = frames.shape[:3]
    # A set, since very short clips give the same index twice.
    shown = tuple(sorted({t // 6, t // 2, t * 5 // 6}))
    middle = shown[len(shown) // 2]
    side = min(h, w, max(64, min(h, w) // 4))
    # Variance as the mean of squares minus the square of the mean, by box filters of the square's
    # size: (h, w) scores of all squares at once.
    luma = frames[middle].mean(-1)
    change = luma - frames[min(middle + 1, t - 1)].mean(-1)
    mean = uniform_filter(luma, side)
    score = uniform_filter(luma**2 + change**2, side) - mean**2
    # The filter puts the mean of a square at its centre, side // 2 after its first pixel.
    inside = score[side // 2 :, side // 2 :][: h - side + 1, : w - side + 1]
    top, left = np.unravel_index(inside.argmax(), inside.shape)
    return View(shown, int(top), int(left), side, h // 2)


class Pictures:
    """Writes and finds the pictures below one folder."""

    def __init__(self, out: Path):
        self.folder = out / "pictures"

    def path(self, clip: str, point: str, file: str) -> Path:
        """Path of a picture; `file` is one of `View.files`."""
        return self.folder / f"{clip}__{point}" / file

    def view(self, clip: Clip) -> View:
        """Returns the view of a clip, and writes pictures of the source if they are missing."""
        path = self.path(clip.name, SOURCE, "view.json")
        stored = self.load_view(clip.name, clip.sha256)
        if stored and self.complete(clip.name, SOURCE, stored):
            return stored
        view = choose_view(clip.frames)
        self.save(clip.name, SOURCE, view, clip.frames)
        write_json(path, {"sha256": clip.sha256, **dataclasses.asdict(view)})
        return view

    def load_view(self, clip: str, sha256: str) -> View | None:
        """Loads the view of a clip with this name and content; None if there is none."""
        try:
            facts = json.loads(self.path(clip, SOURCE, "view.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        if facts.pop("sha256", None) != sha256:
            return None
        return View(**{**facts, "frames": tuple(facts["frames"])})

    def complete(self, clip: str, point: str, view: View) -> bool:
        """Whether all pictures of a point exist."""
        return all(self.path(clip, point, file).is_file() for file in view.files)

    def save(self, clip: str, point: str, view: View, frames: np.ndarray) -> None:
        """Writes the pictures of a point; frames: (t, h, w, 3) uint8."""
        images = [*(frames[index] for index in view.frames), frames[:, view.row]]
        for file, image in zip(view.files, images):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG", compress_level=3)
            write_whole(self.path(clip, point, file), buffer.getvalue())
