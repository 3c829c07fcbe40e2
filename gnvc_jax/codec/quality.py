"""Parameters that depend on the quality level: values at knots, linear in between.

A model has 64 quality levels. Parameters of their own for each would see a 64th of the training
clips; with knots at every eighth level each knot sees a quarter of them, and neighbouring levels
cannot drift apart. `interpolate_levels` turns values at the knots into values at all levels;
`QualityGain` is the most frequent user. The densities of the hyperlatent and the biases of the
integer scale network are the others.
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from gnvc_jax.codec.config import KNOTS, QUALITIES

SPACING = QUALITIES // (KNOTS - 1)  # levels from one knot to the next
# Positions of the knots: 0 is the lowest level, 1 the best. The last knot lies one level beyond the
# best, at 64 / 63.
POSITIONS = SPACING * np.arange(KNOTS) / (QUALITIES - 1)


def interpolate_levels(
    table: Float[Array | np.ndarray, "*dims knots c"],
) -> Float[Array | np.ndarray, "*dims levels c"]:
    """Interpolates values at the KNOTS knots to all QUALITIES levels, in NumPy or JAX."""
    # Level 63 lies 7/8 of the way from knot 7 to knot 8, so `knot + 1` always exists. The fractions
    # are eighths, exact in float32.
    level = np.arange(QUALITIES)
    knot, fraction = level // SPACING, (level % SPACING / SPACING)[:, None].astype(np.float32)
    return table[..., knot, :] * (1 - fraction) + table[..., knot + 1, :] * fraction


class QualityGain(nn.Module):
    """One positive gain per quality level and channel; its logarithm is the parameter.

    Attributes:
        slope: Gains start at exp(slope * q_index / 63): lambda, and with it the best step size, is
            geometric in the quality level.
    """

    slope: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], q_index: Int[Array, " b"]
    ) -> Float[Array, "b h w c"]:
        """Multiplies x by the gains of the quality levels q_index."""

        def init(_: Array, shape: tuple[int, int]) -> Array:
            return jnp.broadcast_to(self.slope * POSITIONS[:, None], shape).astype(jnp.float32)

        # The level of each clip is looked up by index, so that one program serves all levels.
        log_gain = self.param("log_gain", init, (KNOTS, x.shape[-1]))
        return x * jnp.exp(interpolate_levels(log_gain)[q_index])[:, None, None, :]
