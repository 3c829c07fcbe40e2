"""Convolutional head that removes what an inverse block transform leaves: seams and ringing.

The decoder of a linear VAE (`gnvc_jax.vae.klt`) reconstructs blocks of pixels independently.
`DeblockingHead` filters its frames one by one, at a quarter of their resolution: 4x4 pixels become
48 channels, which is cheap, and three 3x3 convolutions see across every seam. It starts as the
identity. Encoder and decoder run it on reference frames, so it is part of the loop.
"""

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
