"""The latent codec as transform coding of a residual, with networks on top.

    y = gain * (basis (latent - prediction) + network(latent, context))
    decoded = prediction + fresh * (inverse basis (y / gain) + network(y / gain, context))

Both networks start at zero, so that before any training the codec is the classical transform coder
that statistics give (`gnvc_jax.codec.fit`); training starts from there rather than from noise. The
prediction of an intra latent is zero. That of a later one is given by the caller, who knows about
motion, or else is the latent decoded before.

With motion, `fresh` is 1 in the cells of 2x2 latents that symbols arrived for and 0 elsewhere,
where the prediction is kept as it is: the skip mode of classical codecs. A network that touches
every cell of every latent, however little, blurs a still scene within a second. Without motion,
fresh is 1, as in the paper.

Latents (b, t, h, w, c) are normalised and padded to multiples of eight (`pad_latents`). The first
latent of a group is coded alone, the others one after another.

Reference: GNVC-VD section 3 (contextual latent codec after DCVC-RT), DCVC-UF for the decoupling of
means from scales. The residual form and its start from statistics are ours.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn

from gnvc_jax.codec.config import CodecConfig
from gnvc_jax.codec.entropy import EntropyModel, LatentSymbols
from gnvc_jax.codec.layers import DepthwiseBlocks, Downsample, dense
from gnvc_jax.codec.quality import QualityGain
from gnvc_jax.codec.quantise import round_ste

Array = jax.Array
ZEROS = nn.initializers.zeros

LATENT_MULTIPLE = 8  # y halves the latent grid, z quarters it again
DETAIL_START = 2.0  # log-odds of keeping the detail of a prediction, before training
GAIN_SLOPE = 2.0  # the best step falls about e^2 times over the quality range
# The codec computes in full float32 on every backend: by default JAX multiplies float32 in bfloat16
# on TPUs and in TF32 on GPUs, and errors of a recurrence add up.
exact = jax.default_matmul_precision("highest")
MEMORY_GRID = 256.0  # the memory is rounded to 1/256, so that smaller differences vanish


class CodecState(NamedTuple):
    """What a predicted latent knows of the past.

    Attributes:
      latent: the latent decoded before, (b, h, w, c).
      memory: features (b, h, w, width) carried from latent to latent; None with motion, since
        features that do not move along with the picture would mislead.
      previous: its integers.
    """

    latent: Array
    memory: Array | None
    previous: LatentSymbols


class DecodedLatent(NamedTuple):
    """One decoded latent.

    Attributes:
      latent: (b, h, w, c).
      feature: (b, h, w, width), what the codec knows; conditions the refiner (f_t of GNVC-VD).
      fresh: (b, h, w, 1), 1 where the latent differs from the prediction, 0 where it is a copy;
        None for a codec without motion.
      detail: (b, h, w, 1), how much of the predicted frames that latents cannot express is worth
        keeping, 1 where fresh is 0; None as for `fresh`. See `gnvc_jax.vae.VAE.compensate`.
    """

    latent: Array
    feature: Array
    fresh: Array | None
    detail: Array | None


class LatentCodecOutput(NamedTuple):
    """Result of encoding in training form.

    Attributes:
      latent, feature, fresh, detail: see `DecodedLatent`.
      integers: quantised, none skipped.
      y_bits, z_bits: differentiable rates (b,) with additive noise in place of rounding.
      written_bits: (b,), cost of the symbols that a stream would hold; no gradient.
    """

    latent: Array
    feature: Array
    fresh: Array | None
    detail: Array | None
    integers: LatentSymbols
    y_bits: Array
    z_bits: Array
    written_bits: Array


def pad_latents(latents: Array) -> Array:
    """Repeat the last row and column up to multiples of LATENT_MULTIPLE: (b, t, h, w, c)."""
    h, w = latents.shape[2:4]
    pads = ((0, 0), (0, 0), (0, -h % LATENT_MULTIPLE), (0, -w % LATENT_MULTIPLE), (0, 0))
    return jnp.pad(latents, pads, mode="edge")


def zero_symbols(config: CodecConfig, batch: int, h: int, w: int) -> LatentSymbols:
    """The integers before an intra latent of size h x w: zeros."""
    y = jnp.zeros((batch, h // 2, w // 2, config.y_channels))
    return LatentSymbols(jnp.zeros((batch, h // 8, w // 8, config.z_channels)), y, y)


def space_to_depth(x: Array) -> Array:
    """2x2 latents to one vector: (b, h, w, c) -> (b, h/2, w/2, 4c)."""
    return rearrange(x, "b (h i) (w j) c -> b h w (i j c)", i=2, j=2)


def depth_to_space(x: Array) -> Array:
    """Undoes `space_to_depth`."""
    return rearrange(x, "b h w (i j c) -> b (h i) (w j) c", i=2, j=2)


def active_cells(symbols: Array) -> Array:
    """1 for the latents of cells that have a symbol other than zero: (b, h/2, w/2, y) to
    (b, h, w, 1). No gradient."""
    active = jnp.any(symbols != 0, axis=-1, keepdims=True).astype(jnp.float32)
    return jax.lax.stop_gradient(repeat(active, "b h w c -> b (h i) (w j) c", i=2, j=2))


class ResidualTransform(nn.Module):
    """Transform and entropy model of one kind of latent.

    Attributes:
      inter: whether latents are predicted; fixes the number of spatial passes and depths.
    """

    config: CodecConfig
    inter: bool

    def setup(self):
        cfg, inter = self.config, self.inter
        c = self.width = cfg.width if inter else cfg.intra_width
        cells, y = 4 * cfg.latent_channels, cfg.y_channels
        orthogonal = nn.initializers.orthogonal()
        self.basis = self.param("basis", orthogonal, (cells, y))
        self.inverse = self.param("inverse", lambda *_: self.basis.T)
        self.whitening = self.param("whitening", nn.initializers.ones, (cfg.latent_channels,))
        if inter:
            self.extractor = DepthwiseBlocks(c, cfg.inter_context)
            self.temporal = Downsample(cfg.entropy_width)
            self.temporal_gain = QualityGain()
            if cfg.motion is None:
                self.update = DepthwiseBlocks(c, 3)
            else:
                self.detail = dense(1, kernel_init=ZEROS)
        self.analysis = DepthwiseBlocks(c, cfg.inter_analysis if inter else cfg.intra_analysis)
        self.merge = dense(y, kernel_init=ZEROS)
        self.entropy = EntropyModel(cfg, passes=2 if inter else 4)
        self.up = dense(4 * c)
        self.synthesis = DepthwiseBlocks(c, cfg.inter_synthesis if inter else cfg.intra_synthesis)
        self.out = dense(cfg.latent_channels, kernel_init=ZEROS)
        self.encoder_gain, self.decoder_gain = QualityGain(), QualityGain()
        self.y_gain, self.y_inverse = QualityGain(GAIN_SLOPE), QualityGain(-GAIN_SLOPE)
        if not inter:
            self.feature = dense(cfg.width)

    def white(self, latent: Array) -> Array:
        """Latents with channels of about equal deviation, as networks like to see them."""
        return latent * jax.lax.stop_gradient(self.whitening)

    def context(
        self, prediction: Array, memory: Array | None, q_index: Array
    ) -> tuple[Array, Array]:
        """Features (b, h, w, width) of the prediction, and the temporal prior of the means."""
        x = self.white(prediction)
        x = self.extractor(x if memory is None else jnp.concatenate([x, memory], axis=-1))
        return x, self.temporal_gain(self.temporal(x), q_index)

    def remember(self, memory: Array, feature: Array) -> Array:
        """Memory after a predicted latent."""
        memory = self.update(jnp.concatenate([memory, feature], axis=-1))
        # Float noise far below the grid does not accumulate.
        return round_ste(memory * MEMORY_GRID) / MEMORY_GRID

    def analyse(
        self, latent: Array, prediction: Array | float, context: Array | None, q_index: Array
    ) -> Array:
        """y (b, h/2, w/2, y_channels), in units of the quantiser's step."""
        residual = latent - prediction
        x = self.white(residual)
        if context is not None:
            x = jnp.concatenate([x, context], axis=-1)
        x = self.encoder_gain(self.analysis(x), q_index)
        y = jnp.dot(space_to_depth(residual), self.basis, precision="highest")
        return self.y_gain(y + self.merge(space_to_depth(x)), q_index)

    def synthesise(
        self,
        y_hat: Array,
        symbols: Array,
        prediction: Array | float,
        context: Array | None,
        q_index: Array,
    ) -> DecodedLatent:
        """The latent that y_hat and its symbols, both (b, h/2, w/2, y_channels), stand for."""
        y = self.y_inverse(y_hat, q_index)
        base = depth_to_space(jnp.dot(y, self.inverse, precision="highest"))
        x = [depth_to_space(self.up(y)), self.white(base)]
        x = jnp.concatenate(x if context is None else [*x, context], axis=-1)
        x = self.decoder_gain(self.synthesis(x), q_index)
        if self.config.motion is None or not self.inter:
            latent, feature = prediction + base + self.out(x), x if self.inter else self.feature(x)
            fresh = None if self.config.motion is None else jnp.ones_like(latent[..., :1])
            return DecodedLatent(latent, feature, fresh, None if fresh is None else 1.0 - fresh)
        fresh = active_cells(symbols)
        # Straight through: a coefficient that rounds to zero must feel the error that it leaves.
        base = base + jax.lax.stop_gradient(fresh * base - base)
        kept = nn.sigmoid(self.detail(x) + DETAIL_START)
        detail = 1.0 - fresh * (1.0 - kept)
        return DecodedLatent(prediction + base + fresh * self.out(x), x, fresh, detail)

    def follow(
        self, y: Array, decoded: DecodedLatent, moved: Array, q_index: Array
    ) -> tuple[Array, DecodedLatent]:
        """Lets gradients pass to the prediction, along the linear part of the codec only.

        An error of the prediction stays where it is copied, and is mended at the price of symbols
        where the latent is coded. Through the networks as well, gradients grow with every latent of
        a long group and soon drown all others.

        Args:
          y: of this latent, (b, h/2, w/2, y_channels).
          decoded: made with a constant prediction.
          moved: prediction minus its constant, (b, h, w, c).

        Returns:
          y for the rate, and the latent; both equal to what was given.
        """
        moved_y = jnp.dot(space_to_depth(moved), self.basis, precision="highest")
        mended = depth_to_space(jnp.dot(moved_y, self.inverse, precision="highest"))
        latent = decoded.latent + moved - decoded.fresh * mended
        return y - self.y_gain(moved_y, q_index), decoded._replace(latent=latent)


class LatentCodec(nn.Module):
    """Intra and predicted transform.

    Methods (``apply(..., method=)``); q_index (b,) int32, a larger one is better quality; state is
    None for an intra latent; prediction (b, h, w, c), by default the state's latent:
      encode(latent, state, q_index, prediction) -> LatentSymbols
      decode(integers, state, q_index, prediction) -> DecodedLatent, CodecState
      train(latent, state, q_index, key, prediction) -> CodecState, LatentCodecOutput
      __call__(latents, q_index, key): the training form over a whole group, without motion
    """

    config: CodecConfig

    def setup(self):
        self.intra = ResidualTransform(self.config, False)
        self.inter = ResidualTransform(self.config, True)

    def _given(self, state: CodecState | None, shape, q_index: Array, prediction: Array | None):
        """Transform, prediction, context, temporal prior and integers before of a latent."""
        if state is None:
            return self.intra, 0.0, None, None, zero_symbols(self.config, *shape)
        prediction = state.latent if prediction is None else prediction
        context, temporal = self.inter.context(prediction, state.memory, q_index)
        return self.inter, prediction, context, temporal, state.previous

    def _after(
        self, state: CodecState | None, decoded: DecodedLatent, integers: LatentSymbols
    ) -> CodecState:
        memory = None
        if self.config.motion is None:
            feature = decoded.feature
            memory = feature if state is None else self.inter.remember(state.memory, feature)
        return CodecState(decoded.latent, memory, integers)

    @exact
    def encode(
        self,
        latent: Array,
        state: CodecState | None,
        q_index: Array,
        prediction: Array | None = None,
    ) -> LatentSymbols:
        given = self._given(state, latent.shape[:3], q_index, prediction)
        part, prediction, context, temporal, previous = given
        y = part.analyse(latent, prediction, context, q_index)
        return part.entropy.encode(y, q_index, temporal, previous)[2]

    @exact
    def decode(
        self,
        integers: LatentSymbols,
        state: CodecState | None,
        q_index: Array,
        prediction: Array | None = None,
    ) -> tuple[DecodedLatent, CodecState]:
        b, h, w, _ = integers.y.shape
        given = self._given(state, (b, 2 * h, 2 * w), q_index, prediction)
        part, prediction, context, temporal, _ = given
        y_hat = part.entropy.decode(integers.y, integers.z, temporal)
        decoded = part.synthesise(y_hat, integers.y, prediction, context, q_index)
        return decoded, self._after(state, decoded, integers)

    @exact
    def train(
        self,
        latent: Array,
        state: CodecState | None,
        q_index: Array,
        key: Array,
        prediction: Array | None = None,
    ) -> tuple[CodecState, LatentCodecOutput]:
        moved = None
        if state is not None and prediction is not None and self.config.motion is not None:
            # Zero, and all that gradients see of the past; what follows is a constant to them.
            moved = prediction - jax.lax.stop_gradient(prediction)
            prediction = jax.lax.stop_gradient(prediction)
        given = self._given(state, latent.shape[:3], q_index, prediction)
        part, prediction, context, temporal, previous = given
        y = part.analyse(latent, prediction, context, q_index)
        y_hat, mu, integers = part.entropy.encode(y, q_index, temporal, previous, skip=False)
        # What a stream has: symbols that it skips are zero.
        sent = integers.y * part.entropy.carries_symbol(integers.index)
        decoded = part.synthesise(y_hat, sent, prediction, context, q_index)
        if moved is not None:
            y, decoded = part.follow(y, decoded, moved, q_index)
        rates = part.entropy.bits(y, mu, integers, q_index, key)
        written = part.entropy.written_bits(integers, q_index)
        # The next latent's scale indices see these integers; gradients through them are noise.
        state = self._after(state, decoded, jax.lax.stop_gradient(integers))
        return state, LatentCodecOutput(*decoded, integers, *rates, written)

    @exact
    def __call__(self, latents: Array, q_index: Array, key: Array) -> LatentCodecOutput:
        """Codes a group (b, t, h, w, c), each latent predicted by the one before.

        Every field of the result that is not None gets an axis t. Gradients flow through time and
        straight through every rounding.
        """
        keys = jax.random.split(key, latents.shape[1])
        state, first = self.train(latents[:, 0], None, q_index, keys[0])

        def step(codec, state, xs):
            latent, key = xs
            return codec.train(latent, state, q_index, key)

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        _, rest = scan(self, state, (jnp.moveaxis(latents[:, 1:], 1, 0), keys[1:]))
        return jax.tree.map(
            lambda a, b: jnp.concatenate([a[:, None], jnp.moveaxis(b, 0, 1)], axis=1), first, rest
        )
