"""The latent codec: latents of a group to symbols and back, one latent after another.

The first latent of a group is coded alone, the others one after another; `CodecState` is what
passes from one to the next. `LatentCodec` has one method for each use: `encode` and `decode` for
streams, `train` for one latent with differentiable rates, `__call__` for a whole group. Each latent
is coded as the residual of a prediction by a `gnvc_jax.codec.transform.ResidualTransform`. The
prediction of an intra latent is zero. That of a later latent is given by the caller, who knows
about motion, or else is the latent decoded before.

Latents (b, t, h, w, c) are normalised and padded to multiples of eight (`pad_latents`).

Reference: GNVC-VD section 3; DCVC-UF for the separation of means from scales.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from gnvc_jax.arrays import AnyArray, Tree
from gnvc_jax.codec.config import LATENT_MULTIPLE, CodecConfig
from gnvc_jax.codec.entropy import LatentSymbols
from gnvc_jax.codec.layers import space_to_depth
from gnvc_jax.codec.transform import DecodedLatent, ResidualTransform

# The codec computes in full float32 on every backend: by default JAX multiplies float32 in bfloat16
# on TPUs and in TF32 on GPUs, and errors of a recurrence add up.
exact = jax.default_matmul_precision("highest")


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


class LatentCodecOutput(NamedTuple):
    """Result of encoding in training form; `LatentCodec.__call__` adds an axis t after b.

    Attributes:
        latent, feature, fresh, detail: See `DecodedLatent`.
        skipped: Change (b, h, w, c) that the latent would have in addition if no cell were a copy;
            None for codecs without motion. The loss uses it for gradients, which copies lack.
        symbols: Rounded symbols, none of them skipped.
        y_bits, z_bits: Differentiable rates (b,) in bits, with additive noise in place of rounding.
        written_y_bits, written_z_bits: Cost (b,) in bits of the symbols that a stream would hold;
            no gradient.
    """

    latent: Array
    feature: Array
    fresh: Array | None
    detail: Array | None
    skipped: Array | None
    symbols: LatentSymbols
    y_bits: Array
    z_bits: Array
    written_y_bits: Array
    written_z_bits: Array


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
        worth: Float[Array, " b"] | None = None,
    ) -> LatentSymbols:
        """Codes a latent to symbols as a stream holds them: skipped elements are zero.

        Args:
            latent, state, q_index, prediction: See the class.
            worth: Bits that a squared error of a latent element is worth, if symbols are to be
                chosen by the bits that they take, too; None rounds to the nearest.
        """
        given = self._given(state, latent.shape[:3], q_index, prediction)
        part, expected, context, temporal, previous = given
        y = part.analyse(latent, expected, context, q_index)
        # The reconstruction is not used: encoders get it from `decode`, as decoders do.
        if worth is None:
            return part.entropy.encode(y, q_index, temporal, previous)[2]
        weight = worth[:, None, None, None]
        given = temporal, previous, True, weight * part.squared_gain(q_index)
        y_hat, _, symbols = part.entropy.encode(y, q_index, *given)
        if state is None or self.config.motion is None:
            return symbols
        # A cell of 2x2 latents is coded only where that costs less than a copy of the prediction.
        # Both costs are in bits, distortion first. A copied cell still pays for its zero symbols,
        # whose tables do not change: they were chosen from z and the past.
        decoded, _ = part.synthesise(y_hat, symbols.y, expected, context, q_index)

        def cost(latents: Array | float, y: Array) -> Array:  # (b, h/2, w/2)
            errors = space_to_depth(weight * (latent - latents) ** 2).sum(-1)
            return errors + part.entropy.y_bits(symbols._replace(y=y)).sum(-1)

        coded = cost(decoded.latent, symbols.y) < cost(expected, jnp.zeros_like(symbols.y))
        return symbols._replace(y=symbols.y * coded[..., None])

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
        return state, LatentCodecOutput(*decoded, skipped, symbols, *rates, *written)

    @exact
    def __call__(
        self,
        latents: Float[AnyArray, "b t h w c"],
        q_index: Int[AnyArray, " b"] | Int[AnyArray, "b t"],
        key: Key[Array, ""],
    ) -> LatentCodecOutput:
        """Runs `train` over a whole group, each latent predicted by the one before.

        Gradients flow through time and straight through every rounding.

        Args:
            latents: Latents of the source.
            q_index: Quality level of each clip, or of each latent.
            key: Key of the noise that stands for rounding in the rates.

        Returns:
            The outputs of all latents: every field that is not None has an axis t after b.
        """
        latents, q_index = jnp.asarray(latents), jnp.asarray(q_index)
        if q_index.ndim == 1:
            q_index = jnp.broadcast_to(q_index[:, None], latents.shape[:2])
        # Every latent has its own key, hence independent noise.
        keys = jax.random.split(key, latents.shape[1])
        state, first = self.train(latents[:, 0], None, q_index[:, 0], keys[0])

        def step(
            codec: LatentCodec, state: CodecState, xs: tuple[Array, Array, Array]
        ) -> tuple[CodecState, LatentCodecOutput]:
            latent, q_index, key = xs
            return codec.train(latent, state, q_index, key)

        # The first latent is coded by another transform, so it stays outside the scan.
        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        # One trip per latent: (b, t - 1, h, w, c) -> (t - 1, b, h, w, c).
        _, rest = scan(
            self, state, (jnp.moveaxis(latents[:, 1:], 1, 0), q_index[:, 1:].T, keys[1:])
        )
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
