"""Motion search against exhaustive search, on pictures whose motion is known."""

import cv2
import numpy as np
import pytest

from gnvc_jax.motion import expand, no_motion
from gnvc_jax.motion.search import differences, search, search_rate, track

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def canvas():
    noise = RNG.integers(0, 256, (320, 320, 3), np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, None, 2.0), None, 0, 255, cv2.NORM_MINMAX)


def view(canvas, x, y, side=128):
    """A window whose top left corner is at (x, y), which may lie between pixels."""
    matrix = np.float32([[1, 0, -x], [0, 1, -y]])
    return cv2.warpAffine(canvas, matrix, (side, side), flags=cv2.INTER_CUBIC)


def inner(field):
    """Coarse vectors away from the border, in pels."""
    return field.coarse[1:-1, 1:-1] / 2


def test_search_finds_the_shift_of_exhaustive_search(canvas):
    reference, frames = (
        view(canvas, 60, 60),
        [view(canvas, 60 + t, 60 - 2 * t) for t in (1, 2, 3, 4)],
    )
    field = search(np.stack(frames), reference, 30.0)
    grey = [cv2.cvtColor(p, cv2.COLOR_RGB2GRAY) for p in (frames[3], reference)]
    shifts = [(x, y) for x in range(-12, 13) for y in range(-24, 25)]
    sums = [differences(*grey, np.broadcast_to(np.array(s), (4, 4, 2)), 32) for s in shifts]
    best = np.array(shifts)[np.argmin(sums, axis=0)][1:-1, 1:-1] / 2
    np.testing.assert_array_equal(best, np.broadcast_to([4, -8], best.shape))
    np.testing.assert_array_equal(inner(field), best)
    assert not field.middle.any()  # linear in time
    vectors = expand(field)[:, 3:-3, 3:-3] / 16
    for t in (1, 2, 3, 4):
        np.testing.assert_allclose(vectors[t - 1], np.broadcast_to([t, -2 * t], vectors[0].shape),
                                   atol=0.26)  # fmt: skip


def test_slow_motion_is_followed_when_frames_are_only_copied(canvas):
    """A pan by a fifth of a pel per latent, which rounds to no motion each time."""
    tracked = start = view(canvas, 60, 60)
    nothing = np.zeros(start.shape[:2], bool)
    for n in range(1, 16):
        frames = np.stack([view(canvas, 60 + 0.2 * n, 60)] * 4)
        tracked = track(frames[-1], tracked, search(frames, tracked, 30.0), nothing)
    inside = slice(16, -16), slice(16, -16)
    left, before = (cv2.absdiff(frames[-1], x)[inside].mean() for x in (tracked, start))
    assert left < 0.2 * before  # the pan of three pels


def test_tracked_frame_is_the_source_where_it_is_coded(canvas):
    source, tracked = view(canvas, 60, 60), view(canvas, 70, 64)
    coded = np.zeros(source.shape[:2], bool)
    coded[32:48, 16:64] = True
    found = track(source, tracked, no_motion(4, 4), coded)
    np.testing.assert_array_equal(found[coded], source[coded])
    np.testing.assert_array_equal(found[~coded], tracked[~coded])


def test_motion_that_reverses_gets_middle_vectors(canvas):
    places = [(4, 0), (8, 0), (4, 0), (0, 0)]
    frames = np.stack([view(canvas, 60 + x, 60 + y) for x, y in places])
    field = search(frames, view(canvas, 60, 60), 30.0)
    vectors = expand(field)[:, 3:-3, 3:-3] / 16
    for got, want in zip(vectors, places):
        assert np.abs(got - want).mean() < 0.3


def test_two_objects_split_a_block(canvas):
    """A quarter that moves by itself inside a still block."""
    reference = view(canvas, 60, 60)
    frame = reference.copy()
    frame[32:48, 32:48] = view(canvas, 63, 60)[32:48, 32:48]
    field = search(np.stack([frame] * 4), reference, 10.0)
    assert field.split[1, 1] and field.split.sum() <= 2
    base = field.coarse[1, 1] + field.fine[2, 2]
    assert np.abs(base / 2 - [3, 0]).max() <= 1


def test_nothing_moves_in_a_flat_or_still_picture(canvas):
    flat = np.full((4, 64, 96, 3), 90, np.uint8)
    still = view(canvas, 60, 60)
    for frames, reference in ((flat, flat[0]), (np.stack([still] * 4), still)):
        field = search(frames, reference, 30.0)
        assert not expand(field).any() and not field.split.any()


def test_search_is_deterministic(canvas):
    frames = np.stack([view(canvas, 60 + 1.3 * t, 60) for t in (1, 2, 3, 4)])
    first, second = (search(frames, view(canvas, 60, 60), 30.0) for _ in range(2))
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a, b)


def test_better_quality_makes_motion_cheaper_to_justify():
    rates = [search_rate(q) for q in range(64)]
    assert np.all(np.diff(rates) < 0)
