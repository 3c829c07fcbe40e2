"""Random clips: what is in them, how often, and that they can be had again.

The videos say in red, green and blue where a pixel came from, so every clip can be traced.
"""

import collections
import json
import logging

import numpy as np
import pytest

from gnvc_jax.data.clips import ClipIndex, clip_dataset

OPTIONS = {"frames": 5, "size": (16, 18), "batch": 2, "seed": 7}


@pytest.fixture(scope="module")
def index(folder, tmp_path_factory):
    return ClipIndex(folder, tmp_path_factory.mktemp("cache"))


def take(dataset, count):
    iterator = iter(dataset)
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return np.stack(batches)


def test_every_clip_is_a_piece_of_a_video(index):
    clips = np.concatenate(take(clip_dataset(index, **OPTIONS), 60)).astype(int)
    assert clips.shape == (120, 5, 16, 18, 3)
    seen = collections.Counter()
    for clip in clips:
        columns, rows, blue = clip[0, 0, :, 0], clip[0, :, 0, 1], clip[..., 2]
        step = abs(columns[1] - columns[0])
        mirrored = columns[1] < columns[0]
        assert (clip[..., 0] == columns).all() and (clip[..., 1] == rows[:, None]).all()
        assert (np.diff(columns) == (-step if mirrored else step)).all()
        assert (np.diff(rows) == step).all()
        assert (blue == blue[:, :1, :1]).all() and (np.diff(blue[:, 0, 0]) == 1).all()
        number, start = divmod(blue[0, 0, 0], 50)
        frames, height, width = [(12, 40, 48), (30, 36, 64)][number]
        assert start + 5 <= frames and rows[-1] < height and columns.max() < width
        seen[number, step, mirrored] += 1
    # Both videos, reduced or not, mirrored or not: all eight kinds, about equally within a video.
    assert len(seen) == 8
    assert 30 < sum(n for (_, _, mirrored), n in seen.items() if mirrored) < 90
    assert 30 < sum(n for (_, step, _), n in seen.items() if step == 2) < 90


def test_downscaled_clip_is_the_mean_of_2x2_pixels(index):
    clips = take(clip_dataset(index, **OPTIONS | {"downscale_prob": 1.0}), 5)
    columns = np.sort(clips[0, 0, 0, 0, :, 0].astype(int))
    assert (np.diff(columns) == 2).all()
    # Pixels x and x + 1 give x + 1/2, which rounds to x + 1.
    assert 1 <= columns[0] <= 64 - 2 * 18 + 1 and columns[-1] == columns[0] + 34
    plain = take(clip_dataset(index, **OPTIONS | {"downscale_prob": 0.0}), 5)
    assert (np.abs(np.diff(plain[..., 0].astype(int), axis=-1)) == 1).all()
    # Where twice the crop is larger than the video, it is not reduced.
    wide = take(clip_dataset(index, **OPTIONS | {"size": (20, 33), "downscale_prob": 1.0}), 5)
    assert (np.abs(np.diff(wide[..., 0].astype(int), axis=-1)) == 1).all()


def test_videos_are_drawn_by_their_length(index, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = clip_dataset(index, **OPTIONS | {"batch": 6})
    assert "1 of 3 videos with fewer than 5 frames" in caplog.text
    for epoch in np.split(take(dataset, 14), 2):  # 12 + 30 frames are 7 batches of 6
        numbers = epoch[:, :, 0, 0, 0, 2] // 50
        assert np.bincount(numbers.ravel()).tolist() == [12, 30]
    with pytest.raises(ValueError, match="31 frames"):
        clip_dataset(index, **OPTIONS | {"frames": 31})


def test_epochs_and_seeds_differ(index):
    clips = take(clip_dataset(index, **OPTIONS), 42)
    assert not np.array_equal(clips[:21], clips[21:])
    other = take(clip_dataset(index, **OPTIONS | {"seed": 8}), 21)
    assert not np.array_equal(clips[:21], other)
    np.testing.assert_array_equal(clips[:21], take(clip_dataset(index, **OPTIONS), 21))


def test_without_shuffling_videos_follow_each_other(index):
    clips = take(clip_dataset(index, **OPTIONS, shuffle=False), 21)
    numbers = (clips[:, :, 0, 0, 0, 2] // 50).ravel()
    assert numbers.tolist() == [0] * 12 + [1] * 30


def test_small_video_is_padded_by_its_edge(index):
    clips = take(clip_dataset(index, **OPTIONS | {"size": (44, 70)}), 8)
    for clip in clips.reshape(-1, 5, 44, 70, 3):
        height, width = [(40, 48), (36, 64)][clip[0, 0, 0, 2] // 50]
        assert len(np.unique(clip[0, 0, :, 0])) == width
        assert len(np.unique(clip[0, :, 0, 1])) == height
        assert (clip[:, height:] == clip[:, height - 1 : height]).all()
        assert (clip[:, :, width:] == clip[:, :, width - 1 : width]).all()


def test_decoding_on_the_fly_gives_the_same(index, folder):
    cached = take(clip_dataset(index, **OPTIONS), 6)
    np.testing.assert_array_equal(cached, take(clip_dataset(ClipIndex(folder), **OPTIONS), 6))


def test_resuming_gives_the_next_batch(index):
    expected = take(clip_dataset(index, **OPTIONS), 30)
    iterator = iter(clip_dataset(index, **OPTIONS))
    for _ in range(25):  # past the end of an epoch
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = iter(clip_dataset(index, **OPTIONS))
    resumed.set_state(state)
    np.testing.assert_array_equal(np.stack([next(resumed) for _ in range(5)]), expected[25:])
    iterator.set_state({"global_next_index": 6})  # and back
    np.testing.assert_array_equal(next(iterator), expected[3])


def test_global_batch_is_the_same_for_any_number_of_processes(index):
    whole = np.concatenate(take(clip_dataset(index, **OPTIONS | {"batch": 4}), 6))
    parts = [take(clip_dataset(index, **OPTIONS, shard=(n, 2)), 6) for n in range(2)]
    together = np.stack(parts, 1).reshape(whole.shape)  # process 0 has the first rows of a batch
    np.testing.assert_array_equal(together, whole)
    # Two processes saved, one goes on.
    saved = iter(clip_dataset(index, **OPTIONS, shard=(1, 2)))
    next(saved)
    alone = iter(clip_dataset(index, **OPTIONS | {"batch": 4}))
    alone.set_state(saved.get_state())
    np.testing.assert_array_equal(next(alone), whole[4:8])


def test_workers_do_not_change_the_data(index):
    expected = take(clip_dataset(index, **OPTIONS), 5)
    iterator = iter(clip_dataset(index, **OPTIONS, num_workers=2, worker_buffer=1))
    iterator.set_state({"global_next_index": 4})
    try:
        np.testing.assert_array_equal(np.stack([next(iterator) for _ in range(3)]), expected[2:])
        assert iterator.get_state() == {"global_next_index": 10}
    finally:
        iterator.close()
