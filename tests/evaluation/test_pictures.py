"""What a sweep keeps to look at: chosen from the source, lossless, not written twice."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from gnvc_jax.evaluation.clips import Clip
from gnvc_jax.evaluation.pictures import Pictures, choose_view
from gnvc_jax.evaluation.points import CodedClip
from gnvc_jax.evaluation.quality import QualityMeter
from gnvc_jax.evaluation.sweep import Sweep


class Negative:
    label, suffix = "negative", ".n"

    def __init__(self):
        self.calls = 0

    def identity(self):
        return {"codec": "negative"}

    def code(self, clip):
        self.calls += 1
        return CodedClip(255 - clip.frames, b"1234")


def noise(t=12, h=40, w=56, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (t, h, w, 3), dtype=np.uint8)


def test_square_is_placed_at_texture_or_motion():
    still = np.full((12, 300, 400, 3), 90, np.uint8)
    textured = still.copy()
    textured[:, 20:95, 300:375] = noise(1, 75, 75)
    view = choose_view(textured)
    assert (view.top, view.left, view.side) == (20, 300, 75)
    moving = still.copy()
    moving[::2, 210:285, 5:80] = 200  # blinks: flat within the square, so only change finds it
    view = choose_view(moving)
    assert abs(view.top - 210) < 75 and abs(view.left - 5) < 75


@pytest.mark.parametrize("t, h, w", [(1, 1, 1), (2, 16, 16), (3, 17, 200), (97, 90, 64)])
def test_views_fit_the_clip(t, h, w):
    view = choose_view(noise(t, h, w))
    assert all(0 <= index < t for index in view.frames)
    assert view.frames == tuple(sorted(set(view.frames)))
    assert 0 <= view.top <= h - view.side and 0 <= view.left <= w - view.side
    assert 0 <= view.row < h
    assert len(view.files) == len(view.frames) + 1


def test_pictures_are_the_decoded_pixels(tmp_path):
    clip = Clip("a", noise(), Fraction(25))
    Sweep(tmp_path, QualityMeter(("psnr",))).run({"a": lambda: clip}, [Negative()])
    view = choose_view(clip.frames)
    for point, frames in (("source", clip.frames), ("negative", 255 - clip.frames)):
        folder = tmp_path / "pictures" / f"a__{point}"
        for index in view.frames:
            np.testing.assert_array_equal(Image.open(folder / f"{index:04d}.png"), frames[index])
        np.testing.assert_array_equal(Image.open(folder / "slice.png"), frames[:, view.row])
    assert not [path for path in tmp_path.rglob(".*")]  # no temporary file stays


def test_only_missing_pictures_are_written_again(tmp_path):
    point, frames = Negative(), noise()

    def sweep(frames=frames):
        clip = Clip("a", frames, Fraction(25))
        return Sweep(tmp_path, QualityMeter(("psnr",))).run({"a": lambda: clip}, [point])

    first = sweep()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert sweep() == first
    assert point.calls == 1
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}

    (tmp_path / "pictures/a__negative/slice.png").unlink()
    sweep()
    assert point.calls == 2
    assert {path for path in tmp_path.rglob("*.png")} == set(kept)

    (tmp_path / "pictures/a__source/view.json").write_text("{")  # the run was killed here
    sweep()
    assert point.calls == 2

    sweep(noise(seed=1))  # another clip of this name
    assert point.calls == 3
    pictures = Pictures(tmp_path)
    view = pictures.load_view("a", Clip("a", noise(seed=1), Fraction(25)).sha256)
    slice_ = Image.open(pictures.path("a", "source", "slice.png"))
    np.testing.assert_array_equal(slice_, noise(seed=1)[:, view.row])
