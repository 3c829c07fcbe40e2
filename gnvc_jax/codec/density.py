"""Rates in bits: the factorised density of the hyperlatent and the Gaussian bins of the residual.

Both give the probability of a bin of width 1 around a symbol. In training the symbol carries
uniform noise in place of rounding, which makes its rate differentiable (Balle et al. 2017, arXiv
1611.01704). `probabilities` evaluates the learned density once more, in float64 on the host, for
the integer tables of a model file.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.scipy.special import ndtr
from jaxtyping import Array, Float, Int

from gnvc_jax.codec.config import KNOTS, Z_BOUND
from gnvc_jax.codec.quality import interpolate_levels
from gnvc_jax.codec.quantise import bound

LAYERS = 4
LIKELIHOOD_MIN = 1e-9  # no symbol costs more than 30 bits, and no logarithm is infinite


class FactorisedDensity(nn.Module):
    """Cumulative distribution of each hyperlatent channel at each quality level.

    F(x) = sigmoid(f4(f3(f2(f1(x))))) with f(x) = x * softplus(h) + b, for the first three followed
    by + tanh(x) * tanh(a) (the univariate form that DCVC uses; after Balle et al. 2018, appendix
    6.1). Strictly increasing by construction.
    """

    channels: int

    def setup(self) -> None:
        # softplus(h) > 0 and |tanh(a)| < 1 make every f_k, and so F, strictly increasing.
        init, shape = nn.initializers.normal(0.01), (LAYERS, KNOTS, self.channels)
        # (layers, levels, channels) after interpolation
        self.h = interpolate_levels(self.param("h", init, shape))
        self.b = interpolate_levels(self.param("b", init, shape))
        self.a = interpolate_levels(self.param("a", init, (LAYERS - 1, *shape[1:])))

    def logit(
        self, x: Float[Array, "b h w c"], q_index: Int[Array, " b"]
    ) -> Float[Array, "b h w c"]:
        """Logit of F at x for the quality levels q_index."""
        for k in range(LAYERS):
            # (levels, c) -> the level of each clip, (b, 1, 1, c)
            h, b = (v[k][q_index][:, None, None, :] for v in (self.h, self.b))
            x = x * nn.softplus(h) + b
            if k < LAYERS - 1:
                x = x + jnp.tanh(x) * jnp.tanh(self.a[k][q_index][:, None, None, :])
        return x

    def bits(
        self, x: Float[Array, "b h w c"], q_index: Int[Array, " b"]
    ) -> Float[Array, "b h w c"]:
        """-log2(F(x + 1/2) - F(x - 1/2)), elementwise."""
        low, high = self.logit(x - 0.5, q_index), self.logit(x + 0.5, q_index)
        # By symmetry of the sigmoid, F(high) - F(low) = F(-low) - F(-high) in terms of logits. Of
        # the two forms, the one whose values are near 0 rather than near 1 keeps its digits.
        # Not jnp.sign, whose 0 for a symmetric density would make the probability of 0 vanish.
        side = jnp.where(low + high > 0.0, -1.0, 1.0)
        p = jnp.abs(nn.sigmoid(side * high) - nn.sigmoid(side * low))
        return -jnp.log2(bound(p, LIKELIHOOD_MIN, 2.0))


def probabilities(params: Mapping) -> Float[np.ndarray, "levels channels symbols"]:
    """Probabilities of the symbols -15..15 under a `FactorisedDensity`, in float64 on the host.

    The end symbols hold the whole tails.

    Args:
        params: Parameters h, b and a of the module.

    Returns:
        Probabilities for all 64 quality levels; each row sums to 1.
    """
    # Tables are made once, at release, and can afford float64; in float32, F is 1 from a logit of
    # about 17 on.
    h, b, a = (interpolate_levels(np.asarray(params[k], np.float64)) for k in ("h", "b", "a"))
    # The 30 edges between the 31 bins, for every level and channel: (levels, channels, 30).
    x = np.arange(-Z_BOUND, Z_BOUND)[None, None] + np.full((*h.shape[1:], 1), 0.5)
    for k in range(LAYERS):
        # `logit` again, with logaddexp(0, h) for softplus(h); h[k] is (levels, channels).
        x = x * np.logaddexp(0, h[k])[..., None] + b[k][..., None]
        if k < LAYERS - 1:
            x = x + np.tanh(x) * np.tanh(a[k])[..., None]
    # F is 0 below the first bin and 1 above the last one, so the end bins take the tails.
    edges = [np.zeros_like(x[..., :1]), 1 / (1 + np.exp(-x)), np.ones_like(x[..., :1])]
    return np.maximum(np.diff(np.concatenate(edges, axis=-1), axis=-1), 0.0)


def cheapest_symbols(
    x: Float[Array, "*shape"],
    sigma: Float[Array, "*shape"] | float,
    worth: Float[Array, "#*shape"] | float,
) -> Float[Array, "*shape"]:
    """Rounds x with the bits in mind: to the nearest whole number, or to the next one towards zero.

    Args:
        x: Values to round.
        sigma: Standard deviations of the tables that the symbols are coded with.
        worth: Bits that a squared error of 1 is worth.
    """
    # A symbol further out costs more in both terms, since probabilities fall with the magnitude.
    # Two steps inwards rarely pay and are not tried. Zero stays zero: its sign is 0.
    nearest = jnp.round(x)
    smaller = nearest - jnp.sign(nearest)

    def cost(symbols: Array) -> Array:
        return worth * (x - symbols) ** 2 + gaussian_bits(symbols, sigma)

    return jnp.where(cost(smaller) < cost(nearest), smaller, nearest)


def gaussian_bits(
    x: Float[Array, "*shape"], sigma: Float[Array, "*shape"] | float
) -> Float[Array, "*shape"]:
    """-log2 of the mass of N(0, sigma^2) on [x - 1/2, x + 1/2], elementwise."""
    x = jnp.abs(x)  # both edges of the bin in the lower tail, where a difference keeps its digits
    p = ndtr((0.5 - x) / sigma) - ndtr((-0.5 - x) / sigma)
    return -jnp.log2(bound(p, LIKELIHOOD_MIN, 2.0))
