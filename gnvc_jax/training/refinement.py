"""The refiner in training: a window of latents, and its velocity there."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gnvc_jax.refiner import per_latent_factors

Array = jax.Array
Tree = Any


@dataclasses.dataclass(frozen=True)
class Window:
    """Latents of a group that are refined together, whitened.

    Attributes:
        first: Place of the first one in the group; traced.
        size: Number of latents.
        white: Factors (t, 1, 1, c) of all latents of the group.
    """

    first: Array
    size: int
    white: Array

    def cut(self, x: Array, axis: int = 1) -> Array:
        """The window's part of an array with an axis of latents."""
        return jax.lax.dynamic_slice_in_dim(x, self.first, self.size, axis)

    def of(self, latents: Array) -> Array:
        """Whitened latents of the window, from those of the group (b, t, h, w, c)."""
        return self.cut(latents * self.white)

    def unwhitened(self, latents: Array) -> Array:
        """Undoes the whitening of latents of the window."""
        return latents / self.cut(self.white, 0)

    def put(self, group: Array, latents: Array) -> Array:
        """Latents of the group with those of the window, whitened, in their place."""
        return jax.lax.dynamic_update_slice_in_dim(group, self.unwhitened(latents), self.first, 1)


def random_window(key: Array, white: Array, count: int, window: int) -> Window:
    """A window of latents to refine, at a random place of the group.

    In use all windows but the first begin inside a group, without an intra latent; so clips are one
    latent longer than what is refined of them.

    Args:
        key: Random key.
        white: Factors (2, c) that whiten first and later latents.
        count: Latents of the group.
        window: Latents that the refiner sees together; fewer where a group has no more.
    """
    size = min(window, max(1, count - 1))
    first = jax.random.randint(key, (), 0, count - size + 1)
    return Window(first, size, per_latent_factors(white, count))


def refiner_velocity(
    refiner: Any, q_index: Array, text: Array | None
) -> Callable[[Tree, Array, Array], Array]:
    """The velocity of a refiner, in the form that `losses.refine_through_last_step` takes.

    Args:
        refiner: `gnvc_jax.refiner.Refiner`.
        q_index: Quality levels (b,).
        text: Text condition (1, rows, width), the same for all clips, or None.

    Returns:
        Function ((params, decoded, features), state, tau) -> velocity, all of one window of
        latents (b, t, h, w, c); tau (b,).
    """

    def velocity(inputs: Tree, state: Array, tau: Array) -> Array:
        params, decoded, features = inputs
        prompt = None
        if text is not None:
            prompt = jnp.broadcast_to(text, (state.shape[0], *text.shape[1:]))
        conditions = decoded, features, q_index, prompt
        return refiner.apply({"params": params}, state, tau, *conditions)

    return velocity
