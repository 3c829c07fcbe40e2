"""A light decoder of latents: TAEHV's, whose weights `taew2_1` decode those of Wan2.1's VAE.

It has no attention and no norms, and its only view of the past is one frame for each block, so it
takes a small part of the operations of the VAE's decoder, at some loss of detail. `LightDecoder`
has the method `decode` of `gnvc_jax.vae.VAE`, and `gnvc_jax.vae.decode_chunk` streams both.

Reference: https://github.com/madebyollin/taehv (MIT licence).
"""

import dataclasses

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from gnvc_jax.arrays import AnyArray
from gnvc_jax.convolution import conv2d_of_doubled
from gnvc_jax.vae.head import FrameConv
from gnvc_jax.vae.layers import prepend_history

LIMIT = 3.0  # latents are softly limited to (-3, 3)


@dataclasses.dataclass(frozen=True)
class LightDecoderConfig:
    """Sizes of a light decoder; the defaults are those of taew2_1 (9.8 M parameters).

    Attributes:
        widths: Channels of each level, coarsest first; the last one is that of full resolution.
        latent_channels: Channels of the latents.
        blocks: Blocks of each level but the last, which has none.
        temporal_up: For each level but the last, whether it doubles the frame rate, too.
    """

    widths: tuple[int, ...] = (256, 128, 64, 64)
    latent_channels: int = 16
    blocks: int = 3
    temporal_up: tuple[bool, ...] = (False, True, True)

    @property
    def stride(self) -> int:
        """Pixels per latent in each spatial direction."""
        return 2 ** (len(self.widths) - 1)

    @property
    def temporal_stride(self) -> int:
        """Frames per latent after the first."""
        return 2 ** sum(self.temporal_up)


class MemoryBlock(nn.Module):
    """Residual block of three convolutions, the first of which also sees the frame before."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Float[Array, "b t h w c"]:
        c = x.shape[-1]
        # (b, t + 1, h, w, c) from the frame before x on; without its last frame, it runs one frame
        # behind x. The reference calls this the memory of the block.
        known, zeros = prepend_history(self, x, 1, first)
        known = jnp.pad(known, ((0, 0), (zeros, 0), (0, 0), (0, 0), (0, 0)))
        y = jnp.concatenate([x, known[:, :-1]], axis=-1)
        for i in range(2):
            y = nn.relu(FrameConv(c, name=f"conv{i}")(y))
        return nn.relu(x + FrameConv(c, name="conv2")(y))


class LightUpsample(nn.Module):
    """Doubles rows and columns, and the frame rate if `frames` is 2; neither layer has a bias.

    The reference doubles the picture first. A product over channels does not see the difference,
    and takes a quarter of the work before.
    """

    features: int
    frames: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 2*h 2*w features"]:
        c = x.shape[-1]
        x = nn.Dense(self.frames * c, use_bias=False, name="grow")(x)
        x = rearrange(x, "b t h w (n c) -> b (t n) h w c", n=self.frames)
        init = nn.initializers.lecun_normal()
        return conv2d_of_doubled(x, self.param("kernel", init, (3, 3, c, self.features)))


class LightDecoder(nn.Module):
    """Normalised latents -> video."""

    config: LightDecoderConfig

    @nn.compact
    def decode(
        self, latents: Float[AnyArray, "b n h w z"], first: bool = True
    ) -> Float[Array, "b t height width 3"]:
        """Decodes latents to frames, which are not clipped to [-1, 1].

        Args:
            latents: Normalised latents, unlike those of `VAE.decode`.
            first: Whether a clip starts here: its first latent gives one frame, later ones give
                four.
        """
        cfg = self.config
        # The reference's `Clamp`, part of what its weights were trained with.
        x = LIMIT * jnp.tanh(jnp.asarray(latents, jnp.float32) / LIMIT)
        x = nn.relu(FrameConv(cfg.widths[0], name="conv_in")(x))
        for level, (width, grows) in enumerate(zip(cfg.widths[1:], cfg.temporal_up)):
            for i in range(cfg.blocks):
                x = MemoryBlock(name=f"level{level}_block{i}")(x, first)
            x = LightUpsample(width, 1 + grows, name=f"level{level}_up")(x)
        x = FrameConv(3, name="conv_out")(nn.relu(x))
        if first:
            # Every latent gives as many frames; of the first one, only the last frame is real.
            x = x[:, cfg.temporal_stride - 1 :]
        return 2 * x - 1  # from [0, 1]
