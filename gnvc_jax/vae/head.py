"""Convolutional head that cleans what an inverse block transform leaves: seams and ringing.

It sees frames one by one at a quarter of their resolution, 4x4 pixels in 48 channels: cheap, and a
block's seam lies in the middle of its field. It starts as the identity.
"""

import jax
from flax import linen as nn

from gnvc_jax.convolution import conv2d
from gnvc_jax.vae.klt import from_blocks, to_blocks

Array = jax.Array

SIDE = 4  # pixels per position, each way


class FrameConv(nn.Module):
    """3x3 convolution of every frame, zero padding: (b, t, h, w, c) -> (b, t, h, w, o)."""

    features: int
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features))
        return conv2d(x, kernel) + self.param("bias", nn.initializers.zeros, (self.features,))


class DeblockingHead(nn.Module):
    """Adds to a video (b, t, h, w, 3) what three convolutions `width` wide make of it."""

    width: int

    @nn.compact
    def __call__(self, video: Array) -> Array:
        x = to_blocks(video, 1, SIDE)
        y = FrameConv(self.width, name="first")(x)
        y = y + FrameConv(self.width, name="second")(nn.relu(y))
        y = FrameConv(x.shape[-1], nn.initializers.zeros, name="last")(nn.relu(y))
        return video + from_blocks(y, 1, SIDE)
