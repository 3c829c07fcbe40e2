"""The head of a small refiner."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnvc_jax.codec.config import KNOTS
from gnvc_jax.refiner.head import DetailHead, init_head

HEAD = DetailHead(8)


@pytest.fixture(scope="module")
def params():
    """Random values everywhere, also where training starts at zero."""
    shapes = jax.eval_shape(lambda key: init_head(8, key), jax.random.key(0))
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda x: jnp.asarray(draw(0, 0.1, x.shape), jnp.float32), shapes)


def frames(*shape):
    return np.random.default_rng(1).uniform(-1, 1, (*shape, 3)).astype(np.float32)


@jax.jit
def apply(params, refined, decoded, q_index):
    return HEAD.apply({"params": params}, refined, decoded, q_index)


def test_a_new_head_is_the_identity():
    refined = frames(2, 3, 16, 8)
    new = init_head(8, jax.random.key(0))
    assert np.array_equal(apply(new, refined, 0 * refined, np.array([0, 63])), refined)


def test_detail_depends_on_what_refinement_changed_and_on_the_level(params):
    refined = frames(2, 1, 16, 16)
    detail = apply(params, refined, refined, np.array([20, 20])) - refined
    assert np.abs(detail).max() > 1e-3
    other = apply(params, refined, 0.5 * refined, np.array([20, 20])) - refined
    assert np.abs(detail - other).max() > 1e-3
    # The quality level of each clip is its own: half way between two knots, the mean of their rows.
    levels = apply(params, refined, refined, np.array([20, 60])) - refined
    np.testing.assert_allclose(levels[0], detail[0], atol=1e-6)
    assert np.abs(levels[1] - detail[1]).max() > 1e-3
    rows = np.asarray(params["quality"])
    assert len(rows) == KNOTS
    between = params | {"quality": jnp.broadcast_to((rows[2] + rows[3]) / 2, rows.shape)}
    again = apply(between, refined, refined, np.array([20, 20])) - refined
    np.testing.assert_allclose(again, detail, atol=1e-5)


def test_frames_are_filtered_alike_wherever_their_content_lies(params):
    """By place, in steps of four pixels, and by time; pixels far away have no influence."""
    small, q_index = frames(1, 2, 16, 16), np.array([30])
    # Six convolutions see six positions, 24 pixels, each way.
    canvas = np.zeros((1, 2, 96, 96, 3), np.float32)
    canvas[:, :, 36:52, 40:56] = small
    moved = np.roll(canvas, (8, -4), (2, 3))[:, ::-1]
    one, two = apply(params, canvas, 0 * canvas, q_index), apply(params, moved, 0 * moved, q_index)
    inner = (slice(None), slice(None), slice(28, 60), slice(28, 64))
    np.testing.assert_allclose(np.roll(one, (8, -4), (2, 3))[:, ::-1][inner], two[inner], atol=1e-5)
    assert np.abs(one - canvas)[inner].max() > 1e-3
