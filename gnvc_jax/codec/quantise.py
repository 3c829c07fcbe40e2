"""Rounding and clipping that gradients can pass.

Training runs the integers of the stream: it rounds where coding rounds. `round_ste` and
`straight_through` give such an operation the gradient of something smooth (Bengio et al. 2013,
arXiv 1308.3432); `bound` clips without trapping a value that has left its range.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from gnvc_jax.arrays import AnyArray

Limit = Shaped[AnyArray, ""] | float | int


def straight_through(
    exact: Shaped[AnyArray, "*shape"], soft: Float[AnyArray, "*shape"]
) -> Float[Array, "*shape"]:
    """Returns `exact`, to the bit, with the gradient of `soft`."""
    # soft - soft is exactly zero where soft is finite, so the sum is exactly `exact`.
    exact, soft = jnp.asarray(exact), jnp.asarray(soft)
    return lax.stop_gradient(exact.astype(soft.dtype)) + (soft - lax.stop_gradient(soft))


def round_ste(x: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """Rounds to whole numbers, half to even, with gradient 1."""
    return straight_through(jnp.round(x), x)


@jax.custom_vjp
def bound(x: Float[AnyArray, "*shape"], low: Limit, high: Limit) -> Float[Array, "*shape"]:
    """Clips x with a gradient that passes inside, and outside where it leads back inside.

    The gradient of a plain clip is zero outside: a parameter that has left its range could never
    return.
    """
    return jnp.clip(x, low, high)


def _bound_forward(x: AnyArray, low: Limit, high: Limit) -> tuple[Array, tuple]:
    return jnp.clip(x, low, high), (x, low, high)


def _bound_backward(saved: tuple, g: Array) -> tuple[Array, None, None]:
    x, low, high = saved
    # A descent step moves x against g: upwards where g < 0, downwards where g > 0.
    keep = ((x >= low) | (g < 0)) & ((x <= high) | (g > 0))
    # The bounds are constants and get no gradient.
    return jnp.where(keep, g, 0.0), None, None


bound.defvjp(_bound_forward, _bound_backward)
