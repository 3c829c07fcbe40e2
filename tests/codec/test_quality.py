"""Values between the knots of the quality axis."""

import jax
import jax.numpy as jnp
import numpy as np

from gnvc_jax.codec.config import CodecConfig
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


def test_levels_between_two_whole_ones_are_mixed_evenly():
    config = CodecConfig(intra_offset=5)
    assert config.levels(30, 9) == [35, *[30] * 8]
    for eighths in range(8):
        groups = [config.levels(30 + eighths / 8, 25, group) for group in range(8)]
        assert np.mean([levels[0] for levels in groups]) == 35 + eighths / 8
        for _, *later in groups:
            sums = np.convolve(np.array(later) - 30, np.ones(8), "valid")
            np.testing.assert_array_equal(sums, eighths)  # in any eight latents in a row
    assert config.levels(63, 3) == [63, 63, 63] and config.levels(0.5, 5)[1:] == [1, 0, 1, 0]
