"""Rates: the factorised density of the hyperlatent and the Gaussian bins of the residual."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.scipy.special import ndtr

from gnvc_jax.codec.config import KNOTS, Z_BOUND
from gnvc_jax.codec.quality import interpolate_levels
from gnvc_jax.codec.quantise import bound

Array = jax.Array
LAYERS = 4
LIKELIHOOD_MIN = 1e-9


class FactorisedDensity(nn.Module):
    """Cumulative distribution of each hyperlatent channel at each quality level.

    F(x) = sigmoid(f4(f3(f2(f1(x))))) with f(x) = x * softplus(h) + b, for the first three followed
    by + tanh(x) * tanh(a) (the univariate form that DCVC uses; after Balle et al. 2018, appendix
    6.1). Strictly increasing by construction.
    """

    channels: int

    def setup(self):
        init, shape = nn.initializers.normal(0.01), (LAYERS, KNOTS, self.channels)
        self.h = interpolate_levels(self.param("h", init, shape))
        self.b = interpolate_levels(self.param("b", init, shape))
        self.a = interpolate_levels(self.param("a", init, (LAYERS - 1, *shape[1:])))

    def logit(self, x: Array, q_index: Array) -> Array:
        """Logit of F at x (b, h, w, channels) for the quality levels q_index (b,)."""
        for k in range(LAYERS):
            h, b = (v[k][q_index][:, None, None, :] for v in (self.h, self.b))
            x = x * nn.softplus(h) + b
            if k < LAYERS - 1:
                x = x + jnp.tanh(x) * jnp.tanh(self.a[k][q_index][:, None, None, :])
        return x

    def bits(self, x: Array, q_index: Array) -> Array:
        """-log2(F(x + 1/2) - F(x - 1/2)), elementwise."""
        low, high = self.logit(x - 0.5, q_index), self.logit(x + 0.5, q_index)
        side = -jnp.sign(jax.lax.stop_gradient(low + high))  # work in the accurate tail
        p = jnp.abs(nn.sigmoid(side * high) - nn.sigmoid(side * low))
        return -jnp.log2(bound(p, LIKELIHOOD_MIN, 2.0))


def probabilities(params: dict) -> np.ndarray:
    """Probabilities (QUALITIES, channels, 31) of the symbols -15..15, in float64 on the host.

    The end symbols hold the whole tails.
    """
    h, b, a = (interpolate_levels(np.asarray(params[k], np.float64)) for k in ("h", "b", "a"))
    x = np.arange(-Z_BOUND, Z_BOUND)[None, None] + np.full((*h.shape[1:], 1), 0.5)
    for k in range(LAYERS):
        x = x * np.logaddexp(0, h[k])[..., None] + b[k][..., None]
        if k < LAYERS - 1:
            x = x + np.tanh(x) * np.tanh(a[k])[..., None]
    edges = [np.zeros_like(x[..., :1]), 1 / (1 + np.exp(-x)), np.ones_like(x[..., :1])]
    return np.maximum(np.diff(np.concatenate(edges, axis=-1), axis=-1), 0.0)


def gaussian_bits(x: Array, sigma: Array) -> Array:
    """-log2 of the mass of N(0, sigma^2) on [x - 1/2, x + 1/2], elementwise.

    Evaluated at |x| so that the difference is taken in the accurate tail.
    """
    x = jnp.abs(x)
    p = ndtr((0.5 - x) / sigma) - ndtr((-0.5 - x) / sigma)
    return -jnp.log2(bound(p, LIKELIHOOD_MIN, 2.0))
