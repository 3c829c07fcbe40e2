"""Filters of what an inverse block transform leaves: seams and ringing.

The decoder of a linear VAE (`gnvc_jax.vae.klt`) reconstructs blocks of pixels independently.
`fade_at_copies` softens the edges between blocks that are coded and blocks that copy a prediction.
`DeblockingHead` filters its frames one by one, at a quarter of their resolution: 4x4 pixels become
48 channels, which is cheap, and three 3x3 convolutions see across every seam. It starts as the
identity. Encoder and decoder run both on reference frames, so they are part of the loop.
"""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from gnvc_jax.convolution import conv2d
from gnvc_jax.vae.klt import from_blocks, to_blocks

SIDE = 4  # pixels per position, each way


class FrameConv(nn.Module):
    """3x3 convolution of every frame with zero padding."""

    features: int
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w features"]:
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features))
        return conv2d(x, kernel) + self.param("bias", nn.initializers.zeros, (self.features,))


class DeblockingHead(nn.Module):
    """Adds a correction to a video, which three convolutions of `width` channels compute."""

    width: int

    @nn.compact
    def __call__(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b t h w 3"]:
        # (b, t, h / 4, w / 4, 48)
        x = to_blocks(video, 1, SIDE)
        y = FrameConv(self.width, name="first")(x)
        y = y + FrameConv(self.width, name="second")(nn.relu(y))
        # Zeros here make the head the identity at first.
        y = FrameConv(x.shape[-1], nn.initializers.zeros, name="last")(nn.relu(y))
        return video + from_blocks(y, 1, SIDE)


def fade_at_copies(
    means: Float[Array, "b t h w 3"], fresh: Float[Array, "b h w 1"], side: int
) -> Float[Array, "b t {side}*h {side}*w 3"]:
    """Computes what makes a change of predicted frames fade where coded blocks meet copied ones.

    Coded blocks often get brighter or darker as a whole. A copied neighbour does not, and the step
    between them shows as an edge. Close to it, the means of blocks become a ramp from the centre of
    one block to that of the other; everything else, detail above all, stays.

    Args:
        means: Means over blocks of the change by what was coded; zero in copied blocks.
        fresh: 1 in coded blocks, 0 in copied ones.
        side: Height and width of a block in pixels.

    Returns:
        What to add to the frames.
    """
    h, w = fresh.shape[1:3]
    # Weights (3, side) of a block and its neighbours before and after in linear interpolation at
    # each pixel of the block; both ways (9, side * side), less the block's own value.
    x = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    one = np.stack([np.maximum(-x, 0), 1 - np.abs(x), np.maximum(x, 0)])
    weights = np.einsum("ai,bj->abij", one, one).reshape(9, -1)
    weights[4] -= 1

    def slopes(blocks: Array) -> Float[Array, "b t h w c side*side"]:
        padded = jnp.pad(blocks, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        around = [padded[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)]
        return jnp.stack(around, axis=-1) @ weights

    # 1 at an edge between coded and copied blocks, falling to 0 at the centres of both: there, half
    # way between the centres, interpolation of `fresh` gives 1/2, hence the factor of two.
    near = 2.0 * jnp.abs(slopes(fresh[:, None]))
    places = {"i": side, "j": side}
    return rearrange(near * slopes(means), "b t h w c (i j) -> b t (h i) (w j) c", **places)
