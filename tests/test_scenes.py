"""Scene cuts: found at splices, and not in motion, flashes, fades, noise and stills."""

import io
import itertools

import cv2
import numpy as np
import pytest

from gnvc_jax.bitstream import StreamReader
from gnvc_jax.coder import Coder
from gnvc_jax.scenes import GRID, REACH, find_cuts, small_picture, split_groups


def shot(seed: int, frames: int, step: int = 2, h: int = 40, w: int = 70) -> np.ndarray:
    """A window that moves over a smooth random picture."""
    canvas = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
    canvas = cv2.resize(canvas, (w + step * frames, h))
    return np.stack([canvas[:, step * t : step * t + w] for t in range(frames)])


def cuts(frames) -> list[int]:
    shown, found = zip(*find_cuts(frames))
    assert all(a is b for a, b in zip(shown, frames, strict=True))
    return [i for i, cut in enumerate(found) if cut]


@pytest.mark.parametrize("place", [1, 2, 3, 4, 9, 17, 18, 19])
def test_a_splice_is_a_cut_wherever_it_is(place):
    video = [*shot(0, place), *shot(1, 20 - place)]
    assert cuts(video) == [place]


def test_two_cuts_close_to_each_other():
    video = [*shot(0, 9), *shot(1, 4), *shot(2, 9)]
    assert cuts(video) == [9, 13]


def test_motion_is_no_cut():
    for step in (0, 2, 7):
        assert cuts(list(shot(0, 20, step))) == []
    assert cuts(list(np.random.default_rng(0).integers(0, 256, (20, 40, 70, 3), np.uint8))) == []


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_flash_is_no_cut(length):
    for place in range(1, 12):
        video = shot(0, 15)
        video[place : place + length] = 250
        assert cuts(list(video)) == []


def test_a_fade_is_no_cut():
    share = np.clip(np.arange(24) / 12 - 0.5, 0, 1)[:, None, None, None]
    mixed = (1 - share) * shot(0, 24) + share * shot(1, 24)
    assert cuts(list(mixed.astype(np.uint8))) == []


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_short_videos(frames):
    assert cuts(list(shot(0, frames))) == []


@pytest.mark.parametrize("shape", [(48, 80), (16, 16), (270, 481)])
def test_small_pictures_are_means_of_areas(shape):
    frame = cv2.resize(shot(3, 1)[0], shape[::-1])
    got = small_picture(frame)
    assert got.shape == (GRID, GRID, 3) and got.dtype == np.int32
    want = cv2.resize(frame.astype(np.float32), (GRID, GRID), interpolation=cv2.INTER_AREA)
    # Exact means, rounded down, where cells are whole pixels.
    assert np.abs(got - want).max() < (12 if shape[0] % GRID else 1)


def test_groups_end_at_cuts_and_at_their_length():
    video = [*shot(0, 14), *shot(1, 3), *shot(2, 6)]
    groups = [list(group) for group in split_groups(video, 5)]
    assert [len(group) for group in groups] == [5, 5, 4, 3, 5, 1]
    assert all(a is b for a, b in zip(itertools.chain(*groups), video, strict=True))
    assert [len(list(g)) for g in split_groups(video, 5, scene_cuts=False)] == [5, 5, 5, 5, 3]
    assert list(split_groups([], 5)) == []


def test_only_a_few_frames_are_held_back():
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield np.zeros((16, 16, 3), np.uint8)

    for given, _ in enumerate(itertools.islice(find_cuts(endless()), 50), 1):
        assert taken - given <= REACH


def test_a_new_scene_is_coded_as_if_it_were_alone(tiny_model):
    coder = Coder(tiny_model(motion=True))
    before, after = shot(0, 7), shot(1, 6)

    def groups(frames, **options):
        out, header = io.BytesIO(), coder.header(70, 40, (25, 1), gop=5)
        coder.encode_frames(frames, out, header, 20, **options)
        with StreamReader(out.getvalue()) as reader:
            decoded = np.stack(list(coder.decode_frames(reader)))
            return list(reader.groups()), decoded

    whole, frames = groups(np.concatenate([before, after]))
    alone, alone_frames = groups(after)
    assert [(g.first_frame, g.n_frames) for g in whole] == [(0, 5), (5, 2), (7, 5), (12, 1)]
    for a, b in zip(whole[2:], alone, strict=True):
        assert (a.crc_symbols, a.segments, a.motion) == (b.crc_symbols, b.segments, b.motion)
    assert len(frames) == 13
    np.testing.assert_array_equal(frames[7:], alone_frames)
    uncut, _ = groups(np.concatenate([before, after]), scene_cuts=False)
    assert [g.first_frame for g in uncut] == [0, 5, 10]
