"""The Wan2.1 causal video VAE: encoder, decoder and the two together.

Shapes: video (b, t, h, w, 3) in [-1, 1] with t = 1 + 4k and h, w multiples of 8; latents
(b, 1 + k, h / 8, w / 8, z), not normalised. See `layers` for the meaning of ``first``.
"""

import jax
import jax.numpy as jnp
from einops import repeat
from flax import linen as nn

from gnvc_jax.vae.config import VAEConfig
from gnvc_jax.vae.head import DeblockingHead
from gnvc_jax.vae.klt import EXACT, BlockTransform, from_blocks, to_blocks
from gnvc_jax.vae.layers import (
    CausalConv,
    ChannelRMSNorm,
    FrameAttention,
    ResidualBlock,
    SpatialDownsample,
    SpatialUpsample,
    TemporalDownsample,
    TemporalUpsample,
)

Array = jax.Array

# Log-variance round the latents of a linear encoder, whose mean square is 1: noise that a decoder
# should bear, since quantisation adds as much at good quality.
LINEAR_LOGVAR = -5.0


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, first: bool) -> Array:
        block = residual(self.remat)
        x = block(x.shape[-1], self.dtype, name="block_0")(x, first)
        x = FrameAttention(self.dtype, name="attention")(x)
        return block(x.shape[-1], self.dtype, name="block_1")(x, first)


class OutputHead(nn.Module):
    """Norm, SiLU and the last 3x3x3 convolution."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, first: bool) -> Array:
        return CausalConv(self.features, self.dtype, name="conv")(
            nn.silu(ChannelRMSNorm(name="norm")(x)), first
        )


def residual(remat: bool) -> type[nn.Module]:
    """The residual block, rematerialised in the backward pass if asked."""
    return nn.remat(ResidualBlock, static_argnums=(2,)) if remat else ResidualBlock


class VAEEncoder(nn.Module):
    """Video (b, t, h, w, 3) -> features (b, t', h/8, w/8, 2z), before the quant convolution."""

    config: VAEConfig
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, first: bool) -> Array:
        cfg, block = self.config, residual(self.remat)
        x = to_blocks(x, 1, cfg.patch)
        x = CausalConv(cfg.widths[0], self.dtype, name="conv_in")(x, first)
        for level, width in enumerate(cfg.widths):
            for i in range(cfg.blocks):
                x = block(width, self.dtype, name=f"level{level}_block{i}")(x, first)
            if level < len(cfg.widths) - 1:
                x = SpatialDownsample(width, self.dtype, name=f"level{level}_down")(x)
                if cfg.temporal_down[level]:
                    x = TemporalDownsample(width, self.dtype, name=f"level{level}_time")(x, first)
        x = MidBlock(self.remat, self.dtype, name="middle")(x, first)
        return OutputHead(2 * cfg.latent_channels, self.dtype, name="head")(x, first)


class VAEDecoder(nn.Module):
    """Latents after the post-quant convolution -> video (b, t, h, w, 3), not clipped."""

    config: VAEConfig
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, first: bool) -> Array:
        cfg, block = self.config, residual(self.remat)
        widths, temporal_up = cfg.widths[::-1], cfg.temporal_down[::-1]
        x = CausalConv(widths[0], self.dtype, name="conv_in")(x, first)
        x = MidBlock(self.remat, self.dtype, name="middle")(x, first)
        for level, width in enumerate(widths):
            for i in range(cfg.blocks + 1):
                x = block(width, self.dtype, name=f"level{level}_block{i}")(x, first)
            if level < len(widths) - 1:
                if temporal_up[level]:
                    x = TemporalUpsample(2 * width, self.dtype, name=f"level{level}_time")(x, first)
                x = SpatialUpsample(width // 2, self.dtype, name=f"level{level}_up")(x)
        x = OutputHead(3 * cfg.patch**2, self.dtype, name="head")(x, first)
        return from_blocks(x, 1, cfg.patch).astype(jnp.float32)


class VAE(nn.Module):
    """Encoder and decoder with their 1x1x1 quant convolutions.

    Methods (use with ``apply(..., method=)``):
      encode(video, first)   -> mean, log-variance (b, t', h/8, w/8, z)
      decode(latents, first) -> video (b, t, h, w, 3), not clipped
      compensate(latent, prediction, predicted, ...) -> video of a latent coded with motion

    Attributes:
        config: sizes.
        remat: whether the backward pass computes the inside of residual blocks again.
        dtype: of the decoder network's activations; all else is float32.
        precision: of the decoder network's products, see `jax.default_matmul_precision`; all others
            are `EXACT`.
    """

    config: VAEConfig
    remat: bool = False
    dtype: jnp.dtype = jnp.float32
    precision: str = EXACT

    def setup(self):
        cfg, z = self.config, self.config.latent_channels
        if cfg.linear:
            self.klt = BlockTransform(z, cfg.stride, cfg.temporal_stride)
            self.head = DeblockingHead(cfg.head) if cfg.head else None
        else:
            self.encoder = VAEEncoder(cfg, self.remat)
            self.quant = CausalConv(2 * z, window=(1, 1, 1))
            self.decoder = VAEDecoder(cfg, self.remat, self.dtype)
            self.post_quant = CausalConv(z, self.dtype, window=(1, 1, 1))

    @jax.default_matmul_precision(EXACT)
    def encode(self, video: Array, first: bool = True) -> tuple[Array, Array]:
        if self.config.linear:
            mean = self.klt.forward(video, first)
            return mean, jnp.full_like(mean, LINEAR_LOGVAR)
        x = self.encoder(video, first)
        mean, logvar = jnp.split(self.quant(x, first), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: Array, first: bool = True) -> Array:
        if self.config.linear:
            return self.clean(self.klt.inverse(latents, first))
        with jax.default_matmul_precision(self.precision):
            return self.decoder(self.post_quant(latents.astype(self.dtype), first), first)

    @jax.default_matmul_precision(EXACT)
    def clean(self, video: Array) -> Array:
        """What the head makes of frames (b, t, h, w, 3), each for itself."""
        return video if self.head is None else self.head(video)

    @jax.default_matmul_precision(EXACT)
    def compensate(
        self,
        latent: Array,
        prediction: Array,
        predicted: Array,
        fresh: Array,
        detail: Array,
        cleaned: int | None = None,
    ) -> Array:
        """Frames of one later latent of a linear VAE that was coded with motion.

        A latent holds the principal components of its frames. What they leave of the predicted
        frames is kept, so that a copied block stays as it is instead of losing its finest detail
        with every latent; the head touches only what is fresh, for the same reason.

        Args:
          latent, prediction: (b, h, w, z), the decoded one and that of the predicted frames.
          predicted: (b, t, 8h, 8w, 3).
          fresh, detail: (b, h, w, 1), see `gnvc_jax.codec.model.DecodedLatent`.
          cleaned: number of last frames that go through the head, by default all.

        Returns:
          (b, t, 8h, 8w, 3), not clipped.
        """

        def of_pixels(weights: Array) -> Array:
            side = self.config.stride
            return repeat(weights, "b h w c -> b 1 (h i) (w j) c", i=side, j=side)

        rest = predicted - self.klt.inverse(prediction[:, None], False)
        video = self.klt.inverse(latent[:, None], False) + of_pixels(detail) * rest
        start = 0 if cleaned is None else video.shape[1] - cleaned
        part = video[:, start:]
        # The head does not pass gradients on to the past, see `ResidualTransform.follow`.
        fixed = jax.lax.stop_gradient(part)
        part = part + of_pixels(fresh) * (self.clean(fixed) - fixed)
        return jnp.concatenate([video[:, :start], part], axis=1)

    def __call__(self, video: Array) -> Array:
        return self.decode(self.encode(video)[0])
