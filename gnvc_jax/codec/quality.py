"""What depends on the quality level: one value per knot, linear between neighbouring knots.

A model has 64 levels. Parameters of its own for each would see a 64th of the training clips; with
knots every eighth level each sees a quarter, and neighbouring levels cannot fall out of step.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gnvc_jax.codec.config import KNOTS, QUALITIES

Array = jax.Array

SPACING = QUALITIES // (KNOTS - 1)
POSITIONS = SPACING * np.arange(KNOTS) / (QUALITIES - 1)  # of the knots: 0 lowest, 1 best level


def interpolate_levels(table):
    """Values at the knots (..., KNOTS, c) -> at all levels (..., QUALITIES, c); NumPy or JAX."""
    level = np.arange(QUALITIES)
    low, part = level // SPACING, (level % SPACING / SPACING)[:, None].astype(np.float32)
    return table[..., low, :] * (1 - part) + table[..., low + 1, :] * part


class QualityGain(nn.Module):
    """One positive gain per quality level and channel; its logarithm is what is stored.

    Starts at exp(slope * q_index / 63): lambda, and with it the best step size, is geometric in
    the quality level.
    """

    slope: float = 0.0

    @nn.compact
    def __call__(self, x: Array, q_index: Array) -> Array:
        """x (b, h, w, c) times the gains of the levels q_index (b,) int32."""

        def init(_, shape):
            return jnp.broadcast_to(self.slope * POSITIONS[:, None], shape).astype(jnp.float32)

        table = self.param("log_gain", init, (KNOTS, x.shape[-1]))
        return x * jnp.exp(interpolate_levels(table)[q_index])[:, None, None, :]
