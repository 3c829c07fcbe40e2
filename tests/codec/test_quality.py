"""Values between the knots of the quality axis."""

import jax
import jax.numpy as jnp
import numpy as np

from gnvc_jax.codec.quality import QualityGain, interpolate_levels


def test_levels_are_linear_between_knots():
    table = np.random.default_rng(0).normal(size=(2, 9, 5))
    got = interpolate_levels(table)
    assert got.shape == (2, 64, 5)
    for i, j in np.ndindex(2, 5):
        want = np.interp(np.arange(64), np.arange(0, 65, 8), table[i, :, j])
        np.testing.assert_allclose(got[i, :, j], want, rtol=1e-6)


def test_initial_gain_is_geometric_in_the_level():
    x, q_index = jnp.ones((3, 2, 2, 4)), jnp.asarray([0, 21, 63])
    gain = QualityGain(slope=2.0)
    params = gain.init(jax.random.key(0), x, q_index)
    out = gain.apply(params, x, q_index)[:, 0, 0, 0]
    np.testing.assert_allclose(out, np.exp(2.0 * np.array([0, 21, 63]) / 63), rtol=1e-5)
