"""The latent codec: transform coding of a residual, with networks on top.

    y = gain * (basis (latent - prediction) + network(latent - prediction, context))
    decoded = prediction + fresh * (inverse basis (y / gain) + network(y / gain, context))

The last layers of both networks start at zero, so before any training the codec is the classical
transform coder that statistics give (`gnvc_jax.codec.fit`), and training starts from there rather
than from noise. The prediction of an intra latent is zero. That of a later latent is given by the
caller, who knows about motion, or else is the latent decoded before.

With motion, `fresh` is 1 in the cells of 2x2 latents that symbols arrived for and 0 elsewhere,
where the prediction is kept as it is: the skip mode of classical codecs. A network that touches
every cell of every latent, however little, blurs a still scene within a second. Without motion,
fresh is 1, as in the paper.

The first latent of a group is coded alone, the others one after another; `CodecState` is what
passes from one to the next. `LatentCodec` has one method for each use: `encode` and `decode` for
streams, `train` for one latent with differentiable rates, `__call__` for a whole group.

Latents (b, t, h, w, c) are normalised and padded to multiples of eight (`pad_latents`).

Reference: GNVC-VD section 3 (contextual latent codec after DCVC-RT), DCVC-UF for the separation of
means from scales. The residual form and its start from statistics are ours.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import repeat
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from gnvc_jax.arrays import AnyArray, Tree
from gnvc_jax.codec.config import LATENT_MULTIPLE, CodecConfig
from gnvc_jax.codec.entropy import EntropyModel, LatentSymbols
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
# The codec computes in full float32 on every backend: by default JAX multiplies float32 in bfloat16
# on TPUs and in TF32 on GPUs, and errors of a recurrence add up.
exact = jax.default_matmul_precision("highest")
MEMORY_GRID = 256.0  # the memory is rounded to 1/256, so that smaller differences vanish


class CodecState(NamedTuple):
    """State of the recurrence: all that a predicted latent knows of the past.

    Attributes:
        latent: The latent decoded before, (b, h, w, c).
        memory: Features (b, h, w, width) carried from latent to latent; None with motion, since
            features that do not move along with the picture would mislead.
        previous: Symbols of the latent before.
    """

    latent: Array
    memory: Array | None
    previous: LatentSymbols


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


class LatentCodecOutput(NamedTuple):
    """Result of encoding in training form; `LatentCodec.__call__` adds an axis t after b.

    Attributes:
        latent, feature, fresh, detail: See `DecodedLatent`.
        skipped: Change (b, h, w, c) that the latent would have in addition if no cell were a copy;
            None for codecs without motion. The loss uses it for gradients, which copies lack.
        symbols: Rounded symbols, none of them skipped.
        y_bits, z_bits: Differentiable rates (b,) in bits, with additive noise in place of rounding.
        written_bits: Cost (b,) in bits of the symbols that a stream would hold; no gradient.
    """

    latent: Array
    feature: Array
    fresh: Array | None
    detail: Array | None
    skipped: Array | None
    symbols: LatentSymbols
    y_bits: Array
    z_bits: Array
    written_bits: Array


def pad_latents(latents: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 c"]:
    """Repeats the last row and column up to multiples of LATENT_MULTIPLE."""
    h, w = latents.shape[2:4]
    pads = ((0, 0), (0, 0), (0, -h % LATENT_MULTIPLE), (0, -w % LATENT_MULTIPLE), (0, 0))
    return jnp.pad(latents, pads, mode="edge")


def zero_symbols(config: CodecConfig, batch: int, h: int, w: int) -> LatentSymbols:
    """Symbols that an intra latent of size h x w sees as those of the latent before."""
    y = jnp.zeros((batch, h // 2, w // 2, config.y_channels))
    # The next latent sees y and index only; z is there because the tuple has it.
    return LatentSymbols(jnp.zeros((batch, h // 8, w // 8, config.z_channels)), y, y)


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


class LatentCodec(nn.Module):
    """The codec: one transform for intra latents, another for predicted ones.

    Call the methods by ``codec.apply(variables, ..., method="encode")``. They share these
    arguments: `q_index` (b,) int32 is the quality level, of which a larger one is better; `state`
    is what the method returned for the latent before, None for an intra latent; `prediction`
    (b, h, w, c) is the prediction by motion, by default the latent of the state.

    Attributes:
        config: Sizes of the codec.
    """

    config: CodecConfig

    def setup(self) -> None:
        self.intra = ResidualTransform(self.config, False)
        self.inter = ResidualTransform(self.config, True)

    def _given(
        self,
        state: CodecState | None,
        shape: tuple[int, ...],
        q_index: Array,
        prediction: Array | None,
    ) -> tuple[ResidualTransform, Array | float, Array | None, Array | None, LatentSymbols]:
        """Chooses the transform for a latent of `shape` (b, h, w) and computes its contexts.

        Returns:
            Transform, prediction, context, temporal prior, and symbols of the latent before.
        """
        if state is None:
            return self.intra, 0.0, None, None, zero_symbols(self.config, *shape)
        # Without motion, the best prediction at hand is the last decoded latent.
        prediction = state.latent if prediction is None else prediction
        context, temporal = self.inter.context(prediction, state.memory, q_index)
        return self.inter, prediction, context, temporal, state.previous

    def _after(
        self, state: CodecState | None, decoded: DecodedLatent, symbols: LatentSymbols
    ) -> CodecState:
        """Builds the state after a latent."""
        # An intra latent's feature becomes the memory as it is; later ones update it.
        memory = None
        if self.config.motion is None:
            feature = decoded.feature
            memory = feature
            if state is not None and state.memory is not None:
                memory = self.inter.remember(state.memory, feature)
        return CodecState(decoded.latent, memory, symbols)

    @exact
    def encode(
        self,
        latent: Float[Array, "b h w c"],
        state: CodecState | None,
        q_index: Int[Array, " b"],
        prediction: Float[Array, "b h w c"] | None = None,
    ) -> LatentSymbols:
        """Codes a latent to symbols as a stream holds them: skipped elements are zero."""
        given = self._given(state, latent.shape[:3], q_index, prediction)
        part, expected, context, temporal, previous = given
        y = part.analyse(latent, expected, context, q_index)
        # The reconstruction is not used: encoders get it from `decode`, as decoders do.
        return part.entropy.encode(y, q_index, temporal, previous)[2]

    @exact
    def decode(
        self,
        symbols: LatentSymbols,
        state: CodecState | None,
        q_index: Int[Array, " b"],
        prediction: Float[Array, "b h w c"] | None = None,
    ) -> tuple[DecodedLatent, CodecState]:
        """Decodes a latent from its symbols.

        Returns:
            The decoded latent, and the state after it.
        """
        symbols = jax.tree.map(jnp.asarray, symbols)  # the bitstream gives NumPy arrays
        b, h, w, _ = symbols.y.shape
        given = self._given(state, (b, 2 * h, 2 * w), q_index, prediction)
        part, expected, context, temporal, _ = given
        # Floating point throughout: nothing here decides how bits are read.
        y_hat = part.entropy.decode(symbols.y, symbols.z, temporal)
        decoded, _ = part.synthesise(y_hat, symbols.y, expected, context, q_index)
        return decoded, self._after(state, decoded, symbols)

    @exact
    def train(
        self,
        latent: Float[Array, "b h w c"],
        state: CodecState | None,
        q_index: Int[Array, " b"],
        key: Key[Array, ""],
        prediction: Float[Array, "b h w c"] | None = None,
    ) -> tuple[CodecState, LatentCodecOutput]:
        """Encodes and decodes a latent with differentiable rates.

        Args:
            latent, state, q_index, prediction: See the class.
            key: Key of the noise that stands for rounding in the rates.

        Returns:
            The state after the latent, and everything that losses need.
        """
        given = self._given(state, latent.shape[:3], q_index, prediction)
        part, expected, context, temporal, previous = given
        # Encode, keeping what a stream would skip.
        y = part.analyse(latent, expected, context, q_index)
        y_hat, mu, symbols = part.entropy.encode(y, q_index, temporal, previous, skip=False)
        # What a stream has: symbols that it skips are zero.
        sent = symbols.y * part.entropy.carries_symbol(symbols.index)
        decoded, skipped = part.synthesise(y_hat, sent, expected, context, q_index)
        # `rates` are trained on; `written` is what a stream would take, for logs.
        rates = part.entropy.bits(y, mu, symbols, q_index, key)
        written = part.entropy.written_bits(symbols, q_index)
        # The next latent's scale indices see these symbols; gradients through them are noise.
        state = self._after(state, decoded, jax.lax.stop_gradient(symbols))
        return state, LatentCodecOutput(*decoded, skipped, symbols, *rates, written)

    @exact
    def __call__(
        self,
        latents: Float[AnyArray, "b t h w c"],
        q_index: Int[AnyArray, " b"],
        key: Key[Array, ""],
    ) -> LatentCodecOutput:
        """Runs `train` over a whole group, each latent predicted by the one before.

        Gradients flow through time and straight through every rounding.

        Returns:
            The outputs of all latents: every field that is not None has an axis t after b.
        """
        latents, q_index = jnp.asarray(latents), jnp.asarray(q_index)
        # Every latent has its own key, hence independent noise.
        keys = jax.random.split(key, latents.shape[1])
        state, first = self.train(latents[:, 0], None, q_index, keys[0])

        def step(
            codec: LatentCodec, state: CodecState, xs: tuple[Array, Array]
        ) -> tuple[CodecState, LatentCodecOutput]:
            latent, key = xs
            return codec.train(latent, state, q_index, key)

        # The first latent is coded by another transform, so it stays outside the scan.
        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        # One trip per latent: (b, t - 1, h, w, c) -> (t - 1, b, h, w, c).
        _, rest = scan(self, state, (jnp.moveaxis(latents[:, 1:], 1, 0), keys[1:]))
        # first: (b, ...), rest: (t - 1, b, ...)
        return jax.tree.map(
            lambda a, b: jnp.concatenate([a[:, None], jnp.moveaxis(b, 0, 1)], axis=1), first, rest
        )


@functools.partial(jax.jit, static_argnums=0)  # also traced once only, for shapes and for values
def init_codec(codec: LatentCodec, key: Key[Array, ""]) -> Tree:
    """Draws random parameters of a latent codec."""
    key_params, key_noise = jax.random.split(key)
    # Two latents, so that both transforms are called, of the smallest size.
    latents = jnp.zeros((1, 2, LATENT_MULTIPLE, LATENT_MULTIPLE, codec.config.latent_channels))
    return codec.init(key_params, latents, jnp.zeros((1,), jnp.int32), key_noise)["params"]
