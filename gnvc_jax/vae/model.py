"""The causal video VAE of Wan2.1 or Wan2.2: encoder, decoder and the two together.

`VAE` is the module that the rest of the package uses, mostly by way of `gnvc_jax.vae.drivers`. With
`VAEConfig.linear` it has the same interface, but a fixed linear transform in place of the networks
(`gnvc_jax.vae.klt`, `gnvc_jax.vae.head`).

Shapes: video (b, t, h, w, 3) in [-1, 1] with t = 1 + 4k and h, w multiples of 8; latents
(b, 1 + k, h / 8, w / 8, z), not normalised; 16 in place of 8 for Wan2.2. See `layers` for the
meaning of ``first``.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from gnvc_jax.arrays import AnyArray, Tree
from gnvc_jax.vae.config import VAEConfig
from gnvc_jax.vae.head import DeblockingHead, fade_at_copies
from gnvc_jax.vae.klt import EXACT, BlockTransform
from gnvc_jax.vae.layers import (
    CausalConv,
    ChannelRMSNorm,
    FrameAttention,
    ResidualBlock,
    SpatialDownsample,
    SpatialUpsample,
    TemporalDownsample,
    TemporalUpsample,
    average_down,
    duplicate_up,
)

# Log-variance around the latents of a linear encoder, whose mean square is 1: noise that a decoder
# must tolerate, since quantisation adds as much at good quality.
LINEAR_LOGVAR = -5.0


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Float[Array, "b t h w c"]:
        block = residual(self.remat)
        x = block(x.shape[-1], self.dtype, name="block_0")(x, first)
        x = FrameAttention(self.dtype, name="attention")(x)
        return block(x.shape[-1], self.dtype, name="block_1")(x, first)


class OutputHead(nn.Module):
    """Norm, SiLU and the last 3x3x3 convolution."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w c"], first: bool
    ) -> Float[Array, "b t h w features"]:
        return CausalConv(self.features, self.dtype, name="conv")(
            nn.silu(ChannelRMSNorm(name="norm")(x)), first
        )


def residual(remat: bool) -> type[nn.Module]:
    """Returns the residual block; with remat, the backward pass computes its inside again."""
    return nn.remat(ResidualBlock, static_argnums=(2,)) if remat else ResidualBlock


class VAEEncoder(nn.Module):
    """Video -> mean and log-variance of latents (2z channels), before the quant convolution."""

    config: VAEConfig
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w 3"], first: bool) -> Float[Array, "b t2 h2 w2 z2"]:
        cfg, block = self.config, residual(self.remat)
        # (b, t, h / patch, w / patch, 3 * patch^2); Wan2.1 has a patch of 1. In Wan2.2's order of
        # channels, columns vary more slowly than rows.
        patch = {"i": cfg.patch, "j": cfg.patch}
        x = rearrange(x, "b t (h i) (w j) c -> b t h w (c j i)", **patch)
        x = CausalConv(cfg.widths[0], self.dtype, name="conv_in")(x, first)
        # All levels but the last halve rows and columns; some of them halve the frame rate, too.
        for level, width in enumerate(cfg.widths):
            given, last = x, level == len(cfg.widths) - 1
            halved = not last and cfg.temporal_down[level]
            for i in range(cfg.blocks):
                x = block(width, self.dtype, name=f"level{level}_block{i}")(x, first)
            if not last:
                x = SpatialDownsample(width, self.dtype, name=f"level{level}_down")(x)
            if halved:
                x = TemporalDownsample(width, self.dtype, name=f"level{level}_time")(x, first)
            if cfg.shortcuts:
                x = x + average_down(given, width, 1 + halved, 1 if last else 2, first)
        # (b, 1 + k, h / 8, w / 8, widths[-1]) at the start of a clip, k latents later.
        x = MidBlock(self.remat, self.dtype, name="middle")(x, first)
        return OutputHead(2 * cfg.latent_channels, self.dtype, name="head")(x, first)


class VAEDecoder(nn.Module):
    """Latents after the post-quant convolution -> video, not clipped."""

    config: VAEConfig
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t2 h2 w2 z"], first: bool) -> Float[Array, "b t h w 3"]:
        cfg, block = self.config, residual(self.remat)
        # The encoder's levels in the opposite order, coarsest first.
        widths, temporal_up = cfg.decoder_widths, cfg.temporal_down[::-1]
        x = CausalConv(widths[0], self.dtype, name="conv_in")(x, first)
        x = MidBlock(self.remat, self.dtype, name="middle")(x, first)
        for level, width in enumerate(widths):
            given = x
            for i in range(cfg.blocks + 1):
                x = block(width, self.dtype, name=f"level{level}_block{i}")(x, first)
            if level < len(widths) - 1:
                doubled = temporal_up[level]
                if doubled:
                    # Twice the channels, which become two frames of `width` channels.
                    x = TemporalUpsample(2 * width, self.dtype, name=f"level{level}_time")(x, first)
                # Without shortcuts, Wan halves the channels here; the next level's first block sets
                # its own width.
                outer = width if cfg.shortcuts else width // 2
                x = SpatialUpsample(outer, self.dtype, name=f"level{level}_up")(x)
                if cfg.shortcuts:
                    x = x + duplicate_up(given, width, 1 + doubled, 2, first)
        x = OutputHead(3 * cfg.patch**2, self.dtype, name="head")(x, first)
        patch = {"i": cfg.patch, "j": cfg.patch}
        x = rearrange(x, "b t h w (c j i) -> b t (h i) (w j) c", **patch)
        return x.astype(jnp.float32)


class VAE(nn.Module):
    """Encoder and decoder with their 1x1x1 quant convolutions.

    Use the methods `encode` and `decode` by ``apply(..., method=)``. In both, `first` says whether
    the input starts a clip.

    Attributes:
        config: Sizes of the networks.
        remat: Whether the backward pass computes the inside of residual blocks again.
        dtype: Type of the decoder network's activations; all else is float32.
        precision: Precision of the decoder network's products, see `jax.default_matmul_precision`;
            that of all others is `EXACT`.
    """

    config: VAEConfig
    remat: bool = False
    dtype: DTypeLike = jnp.float32
    precision: str = EXACT

    def setup(self) -> None:
        cfg, z = self.config, self.config.latent_channels
        if cfg.linear:
            self.klt = BlockTransform(z, cfg.stride, cfg.temporal_stride)
            self.head = DeblockingHead(cfg.head) if cfg.head else None
        else:
            # Always in float32, unlike the decoder: errors of latents would cost bits.
            self.encoder = VAEEncoder(cfg, self.remat)
            self.quant = CausalConv(2 * z, window=(1, 1, 1))
            self.decoder = VAEDecoder(cfg, self.remat, self.dtype)
            self.post_quant = CausalConv(z, self.dtype, window=(1, 1, 1))

    @jax.default_matmul_precision(EXACT)
    def encode(
        self, video: Float[AnyArray, "b t h w 3"], first: bool = True
    ) -> tuple[Float[Array, "b t2 h2 w2 z"], Float[Array, "b t2 h2 w2 z"]]:
        """Encodes frames to the mean and the log-variance of the latents, not normalised."""
        video = jnp.asarray(video)
        if self.config.linear:
            mean = self.klt.forward(video, first)
            return mean, jnp.full_like(mean, LINEAR_LOGVAR)
        # (b, t2, h2, w2, 2z), the mean before the log-variance.
        x = self.encoder(video, first)
        mean, logvar = jnp.split(self.quant(x, first), 2, axis=-1)
        # The limits of diffusers; exp() of either is finite and positive in float32.
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(
        self, latents: Float[AnyArray, "b t2 h2 w2 z"], first: bool = True
    ) -> Float[Array, "b t h w 3"]:
        """Decodes latents to frames, which are not clipped to [-1, 1]."""
        if self.config.linear:
            return self.clean(self.klt.inverse(latents, first))
        with jax.default_matmul_precision(self.precision):
            return self.decoder(self.post_quant(jnp.asarray(latents, self.dtype), first), first)

    @jax.default_matmul_precision(EXACT)
    def clean(self, video: Float[AnyArray, "b t h w 3"]) -> Float[Array, "b t h w 3"]:
        """Filters every frame by the head of a linear VAE, if it has one."""
        video = jnp.asarray(video)
        return video if self.head is None else self.head(video)

    @jax.default_matmul_precision(EXACT)
    def compensate(
        self,
        latent: Float[AnyArray, "b h w z"],
        prediction: Float[AnyArray, "b h w z"],
        predicted: Float[AnyArray, "b t height width 3"],
        fresh: Float[AnyArray, "b h w 1"],
        detail: Float[AnyArray, "b h w 1"],
        cleaned: int | None = None,
    ) -> Float[Array, "b t height width 3"]:
        """Decodes one later latent of a linear VAE that was coded with motion.

        A latent holds the principal components of its frames. What these leave out of the predicted
        frames is kept, so that a copied block stays as it is instead of losing its finest detail
        with every latent. The head filters only what is fresh, for the same reason; with `fade`,
        copied blocks change, too, within half a block of what is fresh.

        Args:
            latent: Decoded latent.
            prediction: Latent of the predicted frames.
            predicted: Predicted frames, one stride of pixels per latent.
            fresh, detail: See `gnvc_jax.codec.transform.DecodedLatent`.
            cleaned: Number of frames, counted from the last, that the head filters; by default all.

        Returns:
            Frames, not clipped.
        """

        def of_pixels(weights: Float[AnyArray, "b h w 1"]) -> Float[Array, "b 1 height width 1"]:
            side = self.config.stride
            return repeat(jnp.asarray(weights), "b h w c -> b 1 (h i) (w j) c", i=side, j=side)

        latent, prediction, detail = (jnp.asarray(x) for x in (latent, prediction, detail))
        # A predicted latent is never the first of a clip, hence the transform of later blocks. With
        # T for its inverse, the frames are T(latent) + detail * (predicted - T(prediction)): the
        # difference is the part of the predicted frames that no latent can express. T is affine,
        # and detail the same all over a block, so both transforms are done at once.
        rest = latent - detail * prediction
        mean = self.klt.inverse(jnp.zeros_like(rest[:, None, :1, :1]), False)
        mean = jnp.tile(mean, (1, 1, *rest.shape[1:3], 1))
        video = self.klt.inverse(rest[:, None], False) + of_pixels(detail) * (predicted - mean)
        if self.config.fade:
            means = self.klt.mean_change(latent - prediction)
            video = video + fade_at_copies(means, jnp.asarray(fresh), self.config.stride)
        start = 0 if cleaned is None else video.shape[1] - cleaned
        part = video[:, start:]
        part = part + of_pixels(fresh) * (self.clean(part) - part)
        return jnp.concatenate([video[:, :start], part], axis=1)

    @jax.default_matmul_precision(EXACT)
    def add_latents(
        self,
        frames: Float[AnyArray, "b t h w 3"],
        latents: Float[AnyArray, "b n h2 w2 z"],
        first: bool,
    ) -> Float[Array, "b t h w 3"]:
        """Changes the frames of a linear VAE as a change of their latents does.

        Args:
            frames: Decoded frames.
            latents: Change of their latents.
            first: Whether the first frame starts a group.
        """
        return jnp.asarray(frames) + self.klt.change(latents, first)

    def __call__(self, video: Float[AnyArray, "b t h w 3"]) -> Float[Array, "b t h w 3"]:
        """Encodes and decodes a video, which initialises all parameters."""
        return self.decode(self.encode(video)[0])


@functools.partial(jax.jit, static_argnums=0)  # also traced once only, for shapes and for values
def init_vae(vae: VAE, key: Key[Array, ""]) -> Tree:
    """Draws random parameters of a VAE."""
    # Two latents in time, so that every layer sees a frame.
    side = 2 * vae.config.stride
    video = jnp.zeros((1, 1 + vae.config.temporal_stride, side, side, 3))
    return vae.init(key, video)["params"]
