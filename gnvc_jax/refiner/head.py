"""Convolutional head of a small refiner: detail that latents cannot express.

The latents of a linear VAE hold the principal components of their frames. What refinement does to
latents therefore changes frames within the space of these components only: it cannot draw the
finest texture. `DetailHead` adds what is missing. It filters the refined frames one by one, at a
quarter of their resolution, and starts as the identity.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from gnvc_jax.arrays import Tree
from gnvc_jax.codec.config import KNOTS
from gnvc_jax.codec.quality import interpolate_levels
from gnvc_jax.vae.head import SIDE, FrameConv
from gnvc_jax.vae.klt import from_blocks, to_blocks

BLOCKS = 2  # residual blocks of two convolutions


class DetailHead(nn.Module):
    """Adds detail to refined frames.

    Attributes:
        width: Channels of the convolutions.
    """

    width: int

    @nn.compact
    def __call__(
        self,
        refined: Float[Array, "b t h w 3"],
        decoded: Float[Array, "b t h w 3"],
        q_index: Int[Array, " b"],
    ) -> Float[Array, "b t h w 3"]:
        """Computes the frames to show.

        Args:
            refined: Frames of refined latents, in [-1, 1].
            decoded: Frames before refinement.
            q_index: Quality levels.
        """
        # (b, t, h / 4, w / 4, 96): the frame, and where and how the DiT changed it.
        x = jnp.concatenate([refined, refined - decoded], axis=-1)
        x = to_blocks(x, 1, SIDE)
        y = FrameConv(self.width, name="first")(x)
        knots = self.param("quality", nn.initializers.zeros, (KNOTS, self.width))
        y = y + interpolate_levels(knots)[q_index][:, None, None, None]
        for i in range(BLOCKS):
            inner = FrameConv(self.width, name=f"block{i}_first")(nn.relu(y))
            y = y + FrameConv(self.width, name=f"block{i}_second")(nn.relu(inner))
        # Zeros here make the head the identity at first.
        y = FrameConv(3 * SIDE**2, nn.initializers.zeros, name="last")(nn.relu(y))
        return refined + from_blocks(y, 1, SIDE)


@functools.partial(jax.jit, static_argnums=0)  # also traced once only, for shapes and for values
def init_head(width: int, key: Key[Array, ""]) -> Tree:
    """Draws random parameters of a head."""
    frames = jnp.zeros((1, 1, SIDE, SIDE, 3))
    return DetailHead(width).init(key, frames, frames, jnp.zeros((1,), int))["params"]
