"""DISTS: bounds, order, and sizes; the formula is compared in tests/parity."""

import jax
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from gnvc_jax.metrics.dists import WEIGHTS, dists, load_dists

distance = jax.jit(dists)


@pytest.fixture(scope="module")
def params():
    return load_dists()


def test_published_weights(params):
    """Their sums as the paper's weights have them: about 0.876 for texture, 0.124 for structure."""
    alpha, beta = float(params["alpha"].sum()), float(params["beta"].sum())
    assert params["alpha"].shape == params["beta"].shape == (3 + 64 + 128 + 256 + 512 + 512,)
    assert min(params["alpha"].min(), params["beta"].min()) >= 0
    assert alpha / (alpha + beta) == pytest.approx(0.876, abs=0.001)
    assert b"Keyan Ding" in WEIGHTS.read_bytes()[:2000]


def test_distances_are_ordered_and_zero_for_identical_images(params):
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (1, 40, 51, 3)).astype(np.float32)
    x = np.repeat(gaussian_filter(x, (0, 1, 1, 0)), 3, axis=0)
    y = np.stack([x[0], gaussian_filter(x[1], (1, 1, 0)), gaussian_filter(x[2], (3, 3, 0))])
    same, blurred, more = distance(params, x, y)
    assert same == pytest.approx(0, abs=1e-5)
    assert 0.01 < blurred < more < 1


def test_rejects_wrong_input(params):
    x = np.zeros((1, 32, 32, 3), np.float32)
    with pytest.raises(ValueError, match="at least 32"):
        dists(params, x[:, :31], x[:, :31])
    with pytest.raises(ValueError, match="two"):
        dists(params, x, x[0])
    with pytest.raises(TypeError, match="float"):
        dists(params, x.astype(np.uint8), x)
