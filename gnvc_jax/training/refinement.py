"""The refiner in training: a random window of latents, and the velocity on it.

A step refines one window of each clip (`random_window`), since the memory of training is that of
the tokens the DiT sees. `refiner_velocity` binds the network for the losses.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gnvc_jax.arrays import Array, Tree
from gnvc_jax.refiner import per_latent_factors


@dataclasses.dataclass(frozen=True)
class Window:
    """Latents of a group that are refined together, whitened.

    Attributes:
        first: Place of the window's first latent in the group; traced.
        size: Number of latents.
        white: Factors (t, 1, 1, c) of all latents of the group.
    """

    first: Array
    size: int
    white: Array

    def cut(self, x: Array, axis: int = 1) -> Array:
        """Cuts the window out of an array with an axis of latents."""
        return jax.lax.dynamic_slice_in_dim(x, self.first, self.size, axis)

    def whitened(self, latents: Array) -> Array:
        """Cuts the window out of the latents (b, t, h, w, c) of a group, and whitens it."""
        # Whitened before the cut, since only the first latent of the group has factors of its own.
        return self.cut(latents * self.white)

    def unwhitened(self, latents: Array) -> Array:
        """Undoes the whitening of latents of the window."""
        # The factors are (t, 1, 1, c): their latents are the first axis.
        return latents / self.cut(self.white, 0)

    def put(self, group: Array, latents: Array) -> Array:
        """Puts whitened latents of the window in their place among the latents of the group."""
        # Latents outside of the window stay as they are in `group`.
        return jax.lax.dynamic_update_slice_in_dim(group, self.unwhitened(latents), self.first, 1)


def random_window(key: Array, white: Array, count: int, window: int) -> Window:
    """Draws a window of latents to refine, at a random place of the group.

    In use all windows but the first begin inside a group, without an intra latent. Clips are
    therefore one latent longer than the part that is refined, so that training sees both cases.

    Args:
        key: Random key.
        white: Factors (2, c) that whiten first and later latents.
        count: Number of latents of the group.
        window: Number of latents that the refiner sees together; fewer where a group has no more.
    """
    # The size is static and the place is traced, so one compilation serves all places.
    size = min(window, max(1, count - 1))
    first = jax.random.randint(key, (), 0, count - size + 1)
    return Window(first, size, per_latent_factors(white, count))


def refiner_velocity(
    refiner: Any, q_index: Array, text: Array | None
) -> Callable[[Tree, Array, Array], Array]:
    """Makes a refiner's velocity in the form that `losses.refine_through_last_step` takes.

    Args:
        refiner: The refiner, `gnvc_jax.refiner.Refiner`.
        q_index: Quality levels of the window's latents (b, t).
        text: Text condition (1, rows, width), the same for all clips, or None.

    Returns:
        Function ((params, decoded, features), state, tau) -> velocity, all of one window of
        latents (b, t, h, w, c); tau (b,).
    """

    def velocity(inputs: Tree, state: Array, tau: Array) -> Array:
        params, decoded, features = inputs
        prompt = None
        if text is not None:
            # One prompt for all clips: (1, rows, width) -> (b, rows, width).
            prompt = jnp.broadcast_to(text, (state.shape[0], *text.shape[1:]))
        conditions = decoded, features, q_index, prompt
        return refiner.apply({"params": params}, state, tau, *conditions)

    return velocity
