"""The stage `transform`: what it logs against files, its samples, its levels."""

import jax
import numpy as np
import pytest

import gnvc_jax
from gnvc_jax.bitstream import StreamReader
from gnvc_jax.data.clips import MARGIN, with_motion
from gnvc_jax.demo import camera_move
from gnvc_jax.motion import expand
from gnvc_jax.training.config import DataConfig, Experiment
from gnvc_jax.training.networks import make_networks
from gnvc_jax.training.rollout import draw_levels, roll_out_with_motion
from gnvc_jax.training.stages import make_stage
from gnvc_jax.training.stages.transform import TransformLoss


@pytest.fixture(scope="module")
def codec():
    return gnvc_jax.load_pretrained("small")


@pytest.fixture(scope="module")
def stage(codec):
    return make_stage(
        Experiment(
            stage="transform",
            vae=codec.model.vae_config,
            codec=codec.model.codec_config,
            loss=TransformLoss(),
            data=DataConfig(size=(128, 128), batch=1),
        )
    )


def test_logged_rate_is_that_of_the_file(codec, stage, rolled):
    """Within 5 % at four levels, where the rate that trains is up to several times as much."""
    video = camera_move(17)[:, 64:192, 64:192]
    model, networks = codec.model, make_networks(stage.experiment)
    params = {"vae": model.vae, "codec": model.codec}
    params = jax.tree.map(lambda x: jax.numpy.asarray(x, np.float32), params)
    code = jax.jit(
        lambda clip: roll_out_with_motion(
            networks, params, *clip, jax.random.split(jax.random.key(0), 5)
        )
    )
    for q_index in (0, 21, 42, 63):
        with StreamReader(codec.encode(video, qp=63 - q_index)) as reader:
            group = next(iter(reader.groups()))
            fields = codec.fields(reader.header, group)
        coded = code(
            (
                np.float32(video[None]) / 127.5 - 1,
                np.stack([expand(field) for field in fields])[None],
                np.array([group.q_indices], np.int32),
            )
        )
        # A segment is whole words: up to 31 bits are not of the symbols.
        size = 8 * len(group.segments[0]) - 16
        assert float(coded.written.sum()) == pytest.approx(size, rel=0.05)
        if q_index == 0:
            assert coded.bits.sum() > 2 * size


def test_levels_of_training_are_those_that_encoders_use():
    """Intra better by the drawn offset, patterns in about half of the clips, all in range."""
    q_index = np.arange(64).repeat(8)
    levels = np.asarray(draw_levels(jax.random.key(0), TransformLoss(), q_index, 6))
    assert levels.shape == (512, 6) and levels.min() >= 0 and levels.max() <= 63
    offsets = (levels - q_index[:, None])[(q_index > 8) & (q_index < 20)]
    assert offsets[:, 0].min() >= 17 and offsets[:, 0].max() <= 33
    flat = (offsets[:, 1:] == 0).all(1)
    assert 0.3 < flat.mean() < 0.7
    np.testing.assert_array_equal(np.unique(offsets[~flat][:, 1:], axis=0), [[-4, -2, -4, 4, -4]])


def test_samples_have_the_vectors_of_their_frames():
    """Of a pan, inside the margin that the search saw."""
    rng = np.random.default_rng(0)
    canvas = rng.integers(0, 256, (24, 24, 3), np.uint8).repeat(12, 0).repeat(12, 1)
    side = 64 + 2 * MARGIN
    clip = np.stack([canvas[t : t + side, 2 * t : 2 * t + side] for t in range(9)])
    sample = with_motion(clip, MARGIN, rng)
    np.testing.assert_array_equal(sample["video"], clip[:, MARGIN:-MARGIN, MARGIN:-MARGIN])
    assert sample["vectors"].shape == (2, 4, 4, 4, 2) and sample["motion_bits"].shape == (2,)
    found = sample["vectors"][:, :, 1:-1, 1:-1] / 16
    want = np.arange(1, 5)[:, None, None, None] * np.array([2.0, 1.0])
    assert np.abs(found - want).mean() < 0.5
