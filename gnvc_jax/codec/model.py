"""The latent codec: one intra transform, one recurrent transform for predicted latents.

Latents (b, t, h, w, c) are normalised and padded to multiples of eight (`pad_latents`). The first
latent of a group is coded alone, the others one after another under the memory of what came
before, carried by `lax.scan`. There is no motion and no optical flow.

Reference: GNVC-VD section 3 (contextual latent codec after DCVC-RT), DCVC-UF for the decoupling of
means from scales.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from gnvc_jax.codec.config import CodecConfig
from gnvc_jax.codec.entropy import EntropyModel, Integers
from gnvc_jax.codec.layers import Block, Blocks, Down2, Halve, dense
from gnvc_jax.codec.quality import Gain
from gnvc_jax.codec.quantise import round_ste

Array = jax.Array

LATENT_MULTIPLE = 8  # y halves the latent grid, z quarters it again
GAIN_SLOPE = 2.0  # the best step falls about e^2 times over the quality range
MEMORY_GRID = 256.0  # the memory is rounded to 1/256, so that smaller differences vanish


class State(NamedTuple):
    """What a predicted latent knows of the past: float memory and the last integers."""

    memory: Array
    previous: Integers


class Coded(NamedTuple):
    """Result of encoding in training form: reconstruction, feature, integers, bits (b,).

    feature (b, h, w, width): what the codec knows after this latent; it conditions the next one and
    the refiner (f_t of GNVC-VD).
    """

    latent: Array
    feature: Array
    integers: Integers
    y_bits: Array
    z_bits: Array


def pad_latents(latents: Array) -> Array:
    """Repeat the last row and column up to multiples of LATENT_MULTIPLE: (b, t, h, w, c)."""
    h, w = latents.shape[2:4]
    pads = ((0, 0), (0, 0), (0, -h % LATENT_MULTIPLE), (0, -w % LATENT_MULTIPLE), (0, 0))
    return jnp.pad(latents, pads, mode="edge")


def no_integers(config: CodecConfig, batch: int, h: int, w: int) -> Integers:
    """The integers before an intra latent of size h x w: zeros."""
    y = jnp.zeros((batch, h // 2, w // 2, config.y_channels))
    return Integers(jnp.zeros((batch, h // 8, w // 8, config.z_channels)), y, y)


class Intra(nn.Module):
    """Codec of the first latent of a group."""

    config: CodecConfig

    def setup(self):
        cfg = self.config
        self.analysis_in = Block(cfg.intra_width, 1)
        self.analysis = Blocks(cfg.intra_width, cfg.intra_analysis, 1)
        self.halve = Halve(cfg.y_channels)
        self.entropy = EntropyModel(cfg, passes=4)
        self.up = dense(4 * cfg.intra_width)
        self.synthesis = Blocks(cfg.intra_width, cfg.intra_synthesis, 1)
        self.out = dense(cfg.latent_channels)
        self.encoder_gain, self.decoder_gain = Gain(), Gain()
        self.y_gain, self.y_inverse = Gain(GAIN_SLOPE), Gain(-GAIN_SLOPE)

    def analyse(self, latent: Array, q_index: Array) -> Array:
        x = self.encoder_gain(self.analysis_in(latent), q_index)
        return self.y_gain(self.halve(self.analysis(x)), q_index)

    def synthesise(self, y_hat: Array, q_index: Array) -> Array:
        x = self.up(self.y_inverse(y_hat, q_index))
        x = rearrange(x, "b h w (i j c) -> b (h i) (w j) c", i=2, j=2)
        return self.out(self.decoder_gain(self.synthesis(x), q_index))


class Inter(nn.Module):
    """Codec of a latent that follows another."""

    config: CodecConfig

    def setup(self):
        cfg, c = self.config, self.config.width
        self.from_latent = Blocks(c, 2)
        self.from_memory = Blocks(c, 3)
        self.extractor = Blocks(c, 4)
        self.temporal = Down2(2 * cfg.y_channels)
        self.analysis = Blocks(c, 3)
        self.halve = Halve(cfg.y_channels)
        self.entropy = EntropyModel(cfg, passes=2)
        self.up = dense(4 * c)
        self.synthesis = Blocks(c, 3)
        self.feature = dense(c)
        self.head = Blocks(c, 2)
        self.out = dense(cfg.latent_channels)
        self.encoder_gain, self.decoder_gain = Gain(), Gain()
        self.temporal_gain = Gain()
        self.y_gain, self.y_inverse = Gain(GAIN_SLOPE), Gain(-GAIN_SLOPE)

    def context(self, memory: Array, q_index: Array) -> tuple[Array, Array]:
        """Features at latent resolution, and the temporal prior of the means."""
        return self.extractor(memory), self.temporal_gain(self.temporal(memory), q_index)

    def analyse(self, latent: Array, context: Array, q_index: Array) -> Array:
        x = self.analysis(jnp.concatenate([latent, context], axis=-1))
        return self.y_gain(self.halve(self.encoder_gain(x, q_index)), q_index)

    def synthesise(self, y_hat: Array, context: Array, q_index: Array) -> tuple[Array, Array]:
        """Latent and the feature that the next latent sees."""
        x = self.up(self.y_inverse(y_hat, q_index))
        x = rearrange(x, "b h w (i j c) -> b (h i) (w j) c", i=2, j=2)
        x = self.synthesis(jnp.concatenate([x, context], axis=-1))
        feature = self.decoder_gain(self.feature(x), q_index)
        return self.out(self.head(feature)), feature

    def start(self, latent: Array) -> Array:
        """Memory after an intra latent."""
        return _settle(self.from_latent(latent))

    def remember(self, memory: Array, feature: Array) -> Array:
        """Memory after a predicted latent."""
        return _settle(self.from_memory(jnp.concatenate([memory, feature], axis=-1)))


def _settle(memory: Array) -> Array:
    """Round the memory to a grid: float noise far below the grid does not accumulate."""
    return round_ste(memory * MEMORY_GRID) / MEMORY_GRID


class LatentCodec(nn.Module):
    """Both codecs and the loop over a group.

    Methods (``apply(..., method=)``); q_index (b,) int32, a larger one is better quality:
      encode_intra(latent, q_index) / encode_inter(latent, state, q_index) -> Integers
      decode_intra(y, z, index, q_index) / decode_inter(y, z, index, state, q_index)
          -> latent, State: the same function on both sides
      index_intra, index_inter: table indices from integers alone
      __call__(latents, q_index, key): the training form over a whole group
    """

    config: CodecConfig

    def setup(self):
        self.intra, self.inter = Intra(self.config), Inter(self.config)

    def encode_intra(self, latent: Array, q_index: Array) -> Integers:
        previous = no_integers(self.config, *latent.shape[:3])
        y = self.intra.analyse(latent, q_index)
        return self.intra.entropy.encode(y, q_index, None, previous)[2]

    def encode_inter(self, latent: Array, state: State, q_index: Array) -> Integers:
        context, temporal = self.inter.context(state.memory, q_index)
        y = self.inter.analyse(latent, context, q_index)
        return self.inter.entropy.encode(y, q_index, temporal, state.previous)[2]

    def decode_intra(self, integers: Integers, q_index: Array) -> tuple[Array, State]:
        y_hat = self.intra.entropy.decode(integers.y, integers.z, None)
        latent = self.intra.synthesise(y_hat, q_index)
        return latent, State(self.inter.start(latent), integers)

    def decode_inter(self, integers: Integers, state: State, q_index: Array) -> tuple[Array, State]:
        context, temporal = self.inter.context(state.memory, q_index)
        y_hat = self.inter.entropy.decode(integers.y, integers.z, temporal)
        latent, feature = self.inter.synthesise(y_hat, context, q_index)
        return latent, State(self.inter.remember(state.memory, feature), integers)

    def train_intra(self, latent: Array, q_index: Array, key: Array) -> tuple[State, Coded]:
        """One intra latent with gradients."""
        entropy = self.intra.entropy
        previous = no_integers(self.config, *latent.shape[:3])
        y = self.intra.analyse(latent, q_index)
        y_hat, mu, integers = entropy.encode(y, q_index, None, previous)
        decoded = self.intra.synthesise(y_hat, q_index)
        rates = entropy.bits(y, mu, integers, q_index, key)
        memory = self.inter.start(decoded)
        return State(memory, integers), Coded(decoded, memory, integers, *rates)

    def train_inter(
        self, state: State, latent: Array, q_index: Array, key: Array
    ) -> tuple[State, Coded]:
        """One predicted latent with gradients."""
        entropy = self.inter.entropy
        context, temporal = self.inter.context(state.memory, q_index)
        y = self.inter.analyse(latent, context, q_index)
        y_hat, mu, integers = entropy.encode(y, q_index, temporal, state.previous)
        decoded, feature = self.inter.synthesise(y_hat, context, q_index)
        rates = entropy.bits(y, mu, integers, q_index, key)
        memory = self.inter.remember(state.memory, feature)
        return State(memory, integers), Coded(decoded, memory, integers, *rates)

    def __call__(self, latents: Array, q_index: Array, key: Array) -> Coded:
        """Code a group (b, t, h, w, c) in training form; every field of Coded gets an axis t.

        Gradients flow through time and straight through every rounding.
        """
        keys = jax.random.split(key, latents.shape[1])
        state, first = self.train_intra(latents[:, 0], q_index, keys[0])

        def step(codec, state, xs):
            latent, key = xs
            return codec.train_inter(state, latent, q_index, key)

        scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
        _, rest = scan(self, state, (jnp.moveaxis(latents[:, 1:], 1, 0), keys[1:]))
        return jax.tree.map(
            lambda a, b: jnp.concatenate([a[:, None], jnp.moveaxis(b, 0, 1)], axis=1), first, rest
        )
