"""What a sweep keeps to look at: a few frames, and one row of pixels over time.

OUT/pictures/CLIP__source/view.json     what is kept of this clip, chosen from the source alone
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
    """What is looked at in one clip.

    frames: their indices; top, left, side: the square that is shown enlarged, in pixels; row: of
    the slice over time.
    """

    frames: tuple[int, ...]
    top: int
    left: int
    side: int
    row: int

    @property
    def middle(self) -> int:
        """Position in `frames` of the one that the square is cut from."""
        return len(self.frames) // 2

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files kept for every point."""
        return (*(f"{index:04d}.png" for index in self.frames), "slice.png")


def choose_view(frames: np.ndarray) -> View:
    """Three frames, and the square that holds most texture and motion in the middle one.

    Args:
        frames: (t, h, w, 3) uint8, the source.

    The square is a quarter of the shorter side, at least 64 pixels where the frame has them, and
    lies where variance of luma plus mean squared change to the next frame is largest: what is
    difficult is chosen before anything is coded.
    """
    t, h, w = frames.shape[:3]
    shown = tuple(sorted({t // 6, t // 2, t * 5 // 6}))
    middle = shown[len(shown) // 2]
    side = min(h, w, max(64, min(h, w) // 4))
    luma = frames[middle].mean(-1)
    change = luma - frames[min(middle + 1, t - 1)].mean(-1)
    mean = uniform_filter(luma, side)
    score = uniform_filter(luma**2 + change**2, side) - mean**2
    # The filter's value at its centre belongs to the square that begins side // 2 before it.
    inside = score[side // 2 :, side // 2 :][: h - side + 1, : w - side + 1]
    top, left = np.unravel_index(inside.argmax(), inside.shape)
    return View(shown, int(top), int(left), side, h // 2)


class Pictures:
    """Writes and finds the pictures below one folder."""

    def __init__(self, out: Path):
        self.folder = out / "pictures"

    def path(self, clip: str, point: str, file: str) -> Path:
        """Of a picture; clip, point: names; file: one of `View.files`."""
        return self.folder / f"{clip}__{point}" / file

    def view(self, clip: Clip) -> View:
        """The view of a clip; pictures of the source are written where they are not there yet."""
        path = self.path(clip.name, SOURCE, "view.json")
        stored = self.load_view(clip.name, clip.sha256)
        if stored and self.complete(clip.name, SOURCE, stored):
            return stored
        view = choose_view(clip.frames)
        self.save(clip.name, SOURCE, view, clip.frames)
        write_json(path, {"sha256": clip.sha256, **dataclasses.asdict(view)})
        return view

    def load_view(self, clip: str, sha256: str) -> View | None:
        """The view kept for the clip of this name and content, or None."""
        try:
            facts = json.loads(self.path(clip, SOURCE, "view.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        if facts.pop("sha256", None) != sha256:
            return None
        return View(**{**facts, "frames": tuple(facts["frames"])})

    def complete(self, clip: str, point: str, view: View) -> bool:
        """Whether every picture of a point is there."""
        return all(self.path(clip, point, file).is_file() for file in view.files)

    def save(self, clip: str, point: str, view: View, frames: np.ndarray) -> None:
        """Writes the pictures of a point; frames: (t, h, w, 3) uint8."""
        images = [*(frames[index] for index in view.frames), frames[:, view.row]]
        for file, image in zip(view.files, images):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG", compress_level=3)
            write_whole(self.path(clip, point, file), buffer.getvalue())
