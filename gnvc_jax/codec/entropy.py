"""The conditional entropy model of one latent: y -> integers (z, q) -> y_hat.

A residual q = round(y - mu) is coded with a zero-mean Gaussian whose table index comes from
integers alone (see `scales`). The mean mu uses every float context, hyperlatent, temporal prior
and the positions decoded in earlier spatial passes, so it may differ by a rounding error between
devices and can never desynchronise a stream.

Shapes: y, q, mu, index (b, h, w, cy) at half the latent resolution; z (b, h/4, w/4, cz).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gnvc_jax.codec.config import SYMBOL_BOUND, Z_BOUND, CodecConfig
from gnvc_jax.codec.density import FactorisedDensity, gaussian_bits
from gnvc_jax.codec.layers import DepthwiseBlock, DepthwiseBlocks, Downsample, Upsample, dense
from gnvc_jax.codec.quantise import bound, round_ste
from gnvc_jax.codec.scales import ScaleNetwork, sigma_from_index

Array = jax.Array

# Which quadrant (TL, TR, BL, BR) of each 2x2 cell the four channel quarters take in each pass.
QUADRANTS = ((0, 1, 2, 3), (3, 2, 1, 0), (2, 3, 0, 1), (1, 0, 3, 2))


class LatentSymbols(NamedTuple):
    """What the entropy path knows of a latent: hyperlatent, symbols, table indices."""

    z: Array
    y: Array
    index: Array


def spatial_masks(passes: int, h: int, w: int, channels: int) -> np.ndarray:
    """Which elements each pass codes: (passes, h, w, channels) of 0 and 1; they sum to 1.

    2 passes: channel halves cross a checkerboard. 4 passes: channel quarters cross 2x2 quadrants.
    """
    row, col = np.arange(h)[:, None] % 2, np.arange(w)[None, :] % 2
    if passes == 2:
        slot, order = (row + col) % 2, ((0, 1), (1, 0))
    else:
        slot, order = 2 * row + col, QUADRANTS
    group = np.arange(channels) * passes // channels
    return np.stack([slot[..., None] == np.asarray(o)[group] for o in order]).astype(np.float32)


class EntropyModel(nn.Module):
    """Hyper transforms, mean and scale networks of one kind of latent (`passes`: intra 4, else 2).

    `previous` are the LatentSymbols of the latent before (y and index used), zeros for intra.
    `temporal` is the float temporal prior (b, h, w, entropy_width), or None for intra.
    """

    config: CodecConfig
    passes: int

    def setup(self):
        cy, cz = self.config.y_channels, self.config.z_channels
        width = self.config.entropy_width
        self.hyper_in = DepthwiseBlock(cz)
        self.hyper_down = (Downsample(cz), Downsample(cz))
        self.hyper_up = (Upsample(cz), Upsample(cz))
        self.hyper_out = DepthwiseBlock(cy)
        self.fusion = DepthwiseBlocks(width, 3 if self.passes == 4 else 2)
        # Means start at zero, so that at first y is what the transform made of it.
        zeros = nn.initializers.zeros
        self.first_mean = dense(cy, kernel_init=zeros)
        self.prior = dense(cy)
        self.adaptors = tuple(DepthwiseBlock(width) for _ in range(self.passes - 1))
        self.spatial = DepthwiseBlocks(width, 2)
        self.later_mean = dense(cy, kernel_init=zeros)
        self.scales = ScaleNetwork(self.config)
        self.density = FactorisedDensity(cz)

    def hyper(self, y: Array) -> Array:
        """The hyperlatent of y, not rounded."""
        y = self.hyper_in(y)
        for down in self.hyper_down:
            y = down(y)
        return y

    def index(self, q_index: Array, z: Array, previous: LatentSymbols) -> Array:
        """Table indices, whole numbers in float32."""
        return self.scales(q_index, z, previous.y, previous.index)

    def passes_over(self, z: Array, temporal: Array | None, residual) -> tuple[Array, Array, Array]:
        """Run the spatial passes; residual(mu) gives the symbols. Returns (y_hat, mu, symbols)."""
        for up in self.hyper_up:
            z = up(z)
        z = self.hyper_out(z)
        x = self.fusion(z if temporal is None else jnp.concatenate([z, temporal], axis=-1))
        masks = spatial_masks(self.passes, *z.shape[1:3], self.config.y_channels)
        prior, mu, y_hat, means, symbols = self.prior(x), self.first_mean(x), 0.0, 0.0, 0.0
        for k, mask in enumerate(masks):
            if k:
                x = self.adaptors[k - 1](jnp.concatenate([prior, y_hat], axis=-1))
                mu = self.later_mean(self.spatial(x))
            q = residual(mu)
            y_hat, means, symbols = y_hat + mask * (mu + q), means + mask * mu, symbols + mask * q
        return y_hat, means, symbols

    def decode(self, symbols: Array, z: Array, temporal: Array | None) -> Array:
        """y_hat from decoded symbols and hyperlatent."""
        return self.passes_over(z, temporal, lambda mu: symbols)[0]

    def encode(
        self,
        y: Array,
        q_index: Array,
        temporal: Array | None,
        previous: LatentSymbols,
        skip: bool = True,
    ) -> tuple[Array, Array, LatentSymbols]:
        """Quantise y: (y_hat, mu, LatentSymbols), with straight-through gradients.

        skip: symbols whose scale index is below `k_skip` are zero, as in a stream. In training
        they had better not be: a coefficient that is zeroed gets no gradient to come back by.
        """
        z = round_ste(bound(self.hyper(y), -Z_BOUND, Z_BOUND))
        index = self.index(q_index, z, previous)
        coded = self.carries_symbol(index) if skip else 1.0

        def residual(mu):
            return coded * round_ste(bound(y - mu, -SYMBOL_BOUND, SYMBOL_BOUND))

        y_hat, mu, symbols = self.passes_over(z, temporal, residual)
        return y_hat, mu, LatentSymbols(z, symbols, index)

    def carries_symbol(self, index: Array) -> Array:
        """1 where an element is written to the stream, 0 where it is skipped; no gradient."""
        return jax.lax.stop_gradient(index >= self.config.k_skip).astype(jnp.float32)

    def written_bits(self, integers: LatentSymbols, q_index: Array) -> Array:
        """Bits (b,) that the tables of a released model will give these symbols."""
        y_bits = gaussian_bits(integers.y, sigma_from_index(integers.index))
        y_bits = y_bits * self.carries_symbol(integers.index)
        bits = _total(y_bits) + _total(self.density.bits(integers.z, q_index))
        return jax.lax.stop_gradient(bits)

    def bits(
        self, y: Array, mu: Array, integers: LatentSymbols, q_index: Array, key: Array
    ) -> tuple[Array, Array]:
        """Rates (b,) in bits of y and z, with additive uniform noise in place of rounding."""
        key_y, key_z = jax.random.split(key)
        noise = jax.random.uniform(key_y, y.shape, minval=-0.5, maxval=0.5)
        y_bits = gaussian_bits(y - mu + noise, sigma_from_index(integers.index))
        z = bound(self.hyper(y), -Z_BOUND, Z_BOUND)
        noise = jax.random.uniform(key_z, z.shape, minval=-0.5, maxval=0.5)
        return _total(y_bits), _total(self.density.bits(z + noise, q_index))


def _total(x: Array) -> Array:
    return jnp.sum(x, axis=(1, 2, 3))
