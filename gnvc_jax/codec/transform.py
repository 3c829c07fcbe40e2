"""The transform of one kind of latent, with its entropy model: latent -> y -> latent.

    y = gain * (basis (latent - prediction) + network(latent - prediction, context))
    decoded = prediction + fresh * (inverse basis (y / gain) + network(y / gain, context))

The last layers of both networks start at zero, so before any training the codec is the classical
transform coder that statistics give (`gnvc_jax.codec.fit`), and training starts from there rather
than from noise.

With motion, `fresh` is 1 in the cells of 2x2 latents that symbols arrived for and 0 elsewhere,
where the prediction is kept as it is: the skip mode of classical codecs. A network that touches
every cell of every latent, however little, blurs a still scene within a second. Without motion,
fresh is 1, as in the paper.

Reference: GNVC-VD section 3 (contextual latent codec after DCVC-RT). The residual form and its
start from statistics are ours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import repeat
from flax import linen as nn
from jaxtyping import Array, Float, Int

from gnvc_jax.codec.config import CodecConfig
from gnvc_jax.codec.entropy import EntropyModel
from gnvc_jax.codec.layers import (
    DepthwiseBlocks,
    Downsample,
    dense,
    depth_to_space,
    space_to_depth,
)
from gnvc_jax.codec.quality import QualityGain
from gnvc_jax.codec.quantise import round_ste

ZEROS = nn.initializers.zeros
DETAIL_START = 2.0  # log-odds of keeping the detail of a prediction, before training
GAIN_SLOPE = 2.0  # the best step shrinks by a factor of about e^2 over the quality range
MEMORY_GRID = 256.0  # the memory is rounded to 1/256, so that smaller differences vanish


class DecodedLatent(NamedTuple):
    """One decoded latent.

    Attributes:
        latent: Decoded normalised latent, (b, h, w, c).
        feature: Last features of the synthesis, (b, h, w, width), which condition the refiner (f_t
            of GNVC-VD).
        fresh: Mask (b, h, w, 1), 1 where the latent differs from the prediction and 0 where it is a
            copy; None for a codec without motion.
        detail: Weight (b, h, w, 1) of the detail of the predicted frames that latents cannot
            express, 1 where fresh is 0; None for a codec without motion. See
            `gnvc_jax.vae.VAE.compensate`.
    """

    latent: Array
    feature: Array
    fresh: Array | None
    detail: Array | None


def active_cells(symbols: Float[Array, "b h w cy"]) -> Float[Array, "b 2*h 2*w 1"]:
    """Marks the latents of cells that have a symbol other than zero by 1, others by 0.

    A decoder knows the marks, since they follow from the symbols. They have no gradient.
    """
    active = jnp.any(symbols != 0, axis=-1, keepdims=True).astype(jnp.float32)
    return jax.lax.stop_gradient(repeat(active, "b h w c -> b (h i) (w j) c", i=2, j=2))


class ResidualTransform(nn.Module):
    """Transform and entropy model of one kind of latent.

    `context` says what is known before a latent, `analyse` gives y, `synthesise` turns a quantised
    y into a latent, and `remember` updates the memory. Names of the submodules are part of the
    format of checkpoints.

    Attributes:
        config: Sizes of the codec.
        inter: Whether latents are predicted; decides the number of spatial passes and the depths.
    """

    config: CodecConfig
    inter: bool

    def setup(self) -> None:
        cfg, inter = self.config, self.inter
        c = self.width = cfg.width if inter else cfg.intra_width
        cells, y = 4 * cfg.latent_channels, cfg.y_channels  # a cell is 2x2 latents
        orthogonal = nn.initializers.orthogonal()
        # The linear transform: cells (4c,) to coefficients (y,) and back.
        self.basis = self.param("basis", orthogonal, (cells, y))
        self.inverse = self.param("inverse", lambda *_: self.basis.T)
        # Statistics of the data; a parameter only so that checkpoints hold it.
        self.whitening = self.param("whitening", nn.initializers.ones, (cfg.latent_channels,))
        if inter:
            # What the past tells, at latent resolution (context) and on the grid of y (temporal
            # prior).
            self.extractor = DepthwiseBlocks(c, cfg.inter_context)
            self.temporal = Downsample(cfg.entropy_width)
            self.temporal_gain = QualityGain()
            if cfg.motion is None:
                self.update = DepthwiseBlocks(c, 3)
            else:
                self.detail = dense(1, kernel_init=ZEROS)
        # The encoder's side: residual and context -> y.
        self.analysis = DepthwiseBlocks(c, cfg.inter_analysis if inter else cfg.intra_analysis)
        self.merge = dense(y, kernel_init=ZEROS)
        self.entropy = EntropyModel(cfg, passes=2 if inter else 4)
        # The decoder's side: y -> latent. `up` gives c channels at latent resolution.
        self.up = dense(4 * c)
        self.synthesis = DepthwiseBlocks(c, cfg.inter_synthesis if inter else cfg.intra_synthesis)
        self.out = dense(cfg.latent_channels, kernel_init=ZEROS)
        self.encoder_gain, self.decoder_gain = QualityGain(), QualityGain()
        # Inverse to each other at first; both are trained. An encoder gain of e^2 at the best level
        # makes the step that much finer there.
        self.y_gain, self.y_inverse = QualityGain(GAIN_SLOPE), QualityGain(-GAIN_SLOPE)
        if not inter:
            # The feature of an intra latent becomes the first memory, which is `width` wide.
            self.feature = dense(cfg.width)

    def white(self, latent: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Scales channels to about equal standard deviations, as the networks expect them."""
        # Not trained: a step on it would change the input of every network at once.
        return latent * jax.lax.stop_gradient(self.whitening)

    def context(
        self,
        prediction: Float[Array, "b h w c"],
        memory: Float[Array, "b h w width"] | None,
        q_index: Int[Array, " b"],
    ) -> tuple[Array, Array]:
        """Computes what encoder and decoder know before a predicted latent.

        Returns:
            Features (b, h, w, width) of the prediction, and the temporal prior of the means,
            (b, h/2, w/2, entropy_width).
        """
        # GNVC-VD's context for analysis and synthesis. Both sides know all that it depends on.
        x = self.white(prediction)
        x = self.extractor(x if memory is None else jnp.concatenate([x, memory], axis=-1))
        return x, self.temporal_gain(self.temporal(x), q_index)

    def remember(
        self, memory: Float[Array, "b h w width"], feature: Float[Array, "b h w width"]
    ) -> Float[Array, "b h w width"]:
        """Updates the memory after a predicted latent; used without motion only."""
        memory = self.update(jnp.concatenate([memory, feature], axis=-1))
        # Encoder and decoder may run on different devices. Differences far below the grid vanish
        # here instead of growing from latent to latent.
        return round_ste(memory * MEMORY_GRID) / MEMORY_GRID

    def analyse(
        self,
        latent: Float[Array, "b h w c"],
        prediction: Float[Array, "b h w c"] | float,
        context: Float[Array, "b h w width"] | None,
        q_index: Int[Array, " b"],
    ) -> Float[Array, "b h//2 w//2 cy"]:
        """Transforms a latent to y, in units of the quantiser's step."""
        # The networks see the whitened residual, the basis sees it as it is: statistics gave the
        # basis for these units.
        residual = latent - prediction
        x = self.white(residual)
        if context is not None:
            x = jnp.concatenate([x, context], axis=-1)
        x = self.encoder_gain(self.analysis(x), q_index)
        # (b, h/2, w/2, 4c) @ (4c, cy); the network's share has 4 * width channels before `merge`.
        y = jnp.dot(space_to_depth(residual), self.basis, precision="highest")
        return self.y_gain(y + self.merge(space_to_depth(x)), q_index)

    def squared_gain(self, q_index: Int[Array, " b"]) -> Float[Array, "b 1 1 cy"]:
        """Squared error of a latent per squared error of y, by channel, without the networks."""
        # Row k of `inverse` is what coefficient k adds to the (4c,) values of a cell: its squared
        # norm is the error in the latent per unit of error in the coefficient.
        ones = jnp.ones((len(q_index), 1, 1, self.config.y_channels))
        return self.y_inverse(ones, q_index) ** 2 * jnp.sum(self.inverse**2, axis=1)

    def synthesise(
        self,
        y_hat: Float[Array, "b hy wy cy"],
        symbols: Float[Array, "b hy wy cy"],
        prediction: Float[Array, "b h w c"] | float,
        context: Float[Array, "b h w width"] | None,
        q_index: Int[Array, " b"],
    ) -> tuple[DecodedLatent, Array | None]:
        """Reconstructs the latent that y_hat and the symbols of a stream stand for.

        Returns:
            The latent, and the change (b, h, w, c) that it would have in addition if no cell were a
            copy; None for codecs without motion, which have no copies.
        """
        y = self.y_inverse(y_hat, q_index)
        # base: the linear decoder alone, (b, h, w, c).
        base = depth_to_space(jnp.dot(y, self.inverse, precision="highest"))
        # The network sees y, what the linear decoder made of it, and the context.
        x = [depth_to_space(self.up(y)), self.white(base)]
        x = jnp.concatenate(x if context is None else [*x, context], axis=-1)
        # x from here on: the last features of the synthesis, which are f_t of GNVC-VD.
        x = self.decoder_gain(self.synthesis(x), q_index)
        if self.config.motion is None or not self.inter:
            latent, feature = prediction + base + self.out(x), x if self.inter else self.feature(x)
            if self.config.motion is None:
                return DecodedLatent(latent, feature, None, None), None
            # An intra latent has no prediction to copy. It fills in what later latents have, so
            # that the outputs of a group can be stacked.
            fresh = jnp.ones_like(latent[..., :1])
            return DecodedLatent(latent, feature, fresh, 1.0 - fresh), jnp.zeros_like(latent)
        # With motion, cells without symbols keep the prediction to the bit.
        fresh, change = active_cells(symbols), base + self.out(x)
        kept = nn.sigmoid(self.detail(x) + DETAIL_START)
        # 1 in copied cells; elsewhere the network decides how much detail survives the change.
        detail = 1.0 - fresh * (1.0 - kept)
        return (
            DecodedLatent(prediction + fresh * change, x, fresh, detail),
            (1.0 - fresh) * change,
        )
