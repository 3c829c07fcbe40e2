"""The conditional entropy model of one latent: y -> integer symbols (z, q) -> y_hat.

A residual q = round(y - mu) is coded with a zero-mean Gaussian whose table index comes from
integers alone (see `scales`). The mean mu uses every float context: the hyperlatent z, the temporal
prior and the positions decoded in earlier spatial passes. It may thus differ by a rounding error
between devices and still never desynchronises a stream, since no parsing depends on it.

`EntropyModel.encode` quantises y, `decode` reverses it, `bits` and `written_bits` are the rates for
training. Shapes: y, q, mu, index (b, h, w, cy) at half the latent resolution; z (b, h/4, w/4, cz).

Source: GNVC-VD section 3; hyperprior after Balle et al. 2018, spatial passes after DCVC-RT.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from gnvc_jax.codec.config import SYMBOL_BOUND, Z_BOUND, CodecConfig
from gnvc_jax.codec.density import FactorisedDensity, cheapest_symbols, gaussian_bits
from gnvc_jax.codec.layers import DepthwiseBlock, DepthwiseBlocks, Downsample, Upsample, dense
from gnvc_jax.codec.quantise import bound, round_ste
from gnvc_jax.codec.scales import ScaleNetwork, sigma_from_index

# Which quadrant of each 2x2 cell (0 top left, 1 top right, 2 bottom left, 3 bottom right) the four
# channel quarters take in each of four passes. Each row and each column holds every quadrant once:
# a pass codes a quarter of the channels at every position, and four passes code everything.
QUADRANTS = ((0, 1, 2, 3), (3, 2, 1, 0), (2, 3, 0, 1), (1, 0, 3, 2))


class LatentSymbols(NamedTuple):
    """The integers of one latent, as whole numbers in float32 inside networks.

    Attributes:
        z: Hyperlatent symbols (b, h/4, w/4, cz).
        y: Residual symbols (b, h, w, cy).
        index: Index of the probability table of each element of y, (b, h, w, cy).
    """

    z: Array
    y: Array
    index: Array


def spatial_masks(
    passes: int, h: int, w: int, channels: int
) -> Float[np.ndarray, "passes h w channels"]:
    """Which elements each pass codes, as 0 and 1; the masks of all passes add up to 1.

    With 2 passes, channel halves take opposite colours of a checkerboard. With 4 passes, channel
    quarters take different quadrants of each 2x2 cell.
    """
    # (h, 1) and (1, w), which broadcast to the parity or the quadrant of each position: (h, w).
    row, column = np.arange(h)[:, None] % 2, np.arange(w)[None, :] % 2
    if passes == 2:
        slot, order = (row + column) % 2, ((0, 1), (1, 0))
    else:
        slot, order = 2 * row + column, QUADRANTS
    group = np.arange(channels) * passes // channels  # the half or quarter of each channel
    # order[k][g] is the slot that channel group g takes in pass k: (passes, h, w, channels).
    return np.stack([slot[..., None] == np.asarray(o)[group] for o in order]).astype(np.float32)


class EntropyModel(nn.Module):
    """Hyper transforms, mean and scale networks of one kind of latent.

    Encoding and decoding call the same `run_passes`, so a mean is computed from the same values on
    both sides. In all methods, `temporal` is the float temporal prior (b, h, w, entropy_width),
    None for an intra latent, and `previous` holds the symbols of the latent before (y and index are
    used), zeros for an intra latent.

    Attributes:
        config: Sizes of the codec.
        passes: Spatial passes: 4 for intra latents, 2 for predicted ones, which have a prior.
    """

    config: CodecConfig
    passes: int

    def setup(self) -> None:
        cy, cz = self.config.y_channels, self.config.z_channels
        width = self.config.entropy_width
        # From y, at half the resolution of the latents, to z, at an eighth, and back.
        self.hyper_in = DepthwiseBlock(cz)
        self.hyper_down = (Downsample(cz), Downsample(cz))
        self.hyper_up = (Upsample(cz), Upsample(cz))
        self.hyper_out = DepthwiseBlock(cy)
        # Three blocks for intra latents, two for predicted ones, as in DCVC-UF.
        self.fusion = DepthwiseBlocks(width, 3 if self.passes == 4 else 2)
        # Means start at zero, so that at first y is what the transform made of it.
        zeros = nn.initializers.zeros
        self.first_mean = dense(cy, kernel_init=zeros)
        self.prior = dense(cy)
        # One adaptor for each pass after the first; these passes share the network behind it.
        self.adaptors = tuple(DepthwiseBlock(width) for _ in range(self.passes - 1))
        self.spatial = DepthwiseBlocks(width, 2)
        self.later_mean = dense(cy, kernel_init=zeros)
        self.scales = ScaleNetwork(self.config)
        self.density = FactorisedDensity(cz)

    def hyper(self, y: Float[Array, "b h w cy"]) -> Float[Array, "b h//4 w//4 cz"]:
        """The hyperlatent of y, not rounded."""
        y = self.hyper_in(y)
        for down in self.hyper_down:
            y = down(y)
        return y

    def index(
        self, q_index: Int[Array, " b"], z: Float[Array, "b h w cz"], previous: LatentSymbols
    ) -> Float[Array, "b 4*h 4*w cy"]:
        """Table indices, whole numbers."""
        return self.scales(q_index, z, previous.y, previous.index)

    def run_passes(
        self,
        z: Float[Array, "b h w cz"],
        temporal: Float[Array, "b 4*h 4*w width"] | None,
        residual: Callable[[Array], Array],
    ) -> tuple[Array, Array, Array]:
        """Runs the spatial passes, each with means that see what earlier passes decoded.

        Args:
            z: Hyperlatent symbols.
            temporal: Temporal prior.
            residual: Gives the symbols (b, h, w, cy) for means of the same shape; only those that
                the mask of the pass selects are used.

        Returns:
            y_hat, mu and symbols, all (b, h, w, cy).
        """
        # What all passes share: the hyperlatent, and for a predicted latent what the past tells.
        for up in self.hyper_up:
            z = up(z)
        z = self.hyper_out(z)  # (b, h, w, cy), on the grid of y
        x = self.fusion(z if temporal is None else jnp.concatenate([z, temporal], axis=-1))
        # The masks are constants of the program; one has the shape (h, w, cy).
        _, h, w, _ = z.shape
        masks = spatial_masks(self.passes, h, w, self.config.y_channels)
        prior, mu, y_hat, means, symbols = self.prior(x), self.first_mean(x), 0.0, 0.0, 0.0
        for k, mask in enumerate(masks):
            if k:
                # y_hat is zero where nothing is decoded yet.
                x = self.adaptors[k - 1](jnp.concatenate([prior, y_hat], axis=-1))
                mu = self.later_mean(self.spatial(x))
            # Every pass computes the whole grid and keeps the elements of its mask.
            q = residual(mu)
            y_hat, means, symbols = y_hat + mask * (mu + q), means + mask * mu, symbols + mask * q
        return y_hat, means, symbols  # pyright: ignore[reportReturnType] - there is a first pass

    def decode(
        self,
        symbols: Float[Array, "b h w cy"],
        z: Float[Array, "b hz wz cz"],
        temporal: Float[Array, "b h w width"] | None,
    ) -> Float[Array, "b h w cy"]:
        """y_hat from decoded symbols and hyperlatent."""
        # All symbols are known before the first pass, since table indices do not depend on passes.
        # Only the means must be computed in the order of the encoder.
        return self.run_passes(z, temporal, lambda mu: symbols)[0]

    def encode(
        self,
        y: Float[Array, "b h w cy"],
        q_index: Int[Array, " b"],
        temporal: Float[Array, "b h w width"] | None,
        previous: LatentSymbols,
        skip: bool = True,
        worth: Float[Array, "b 1 1 cy"] | None = None,
    ) -> tuple[Array, Array, LatentSymbols]:
        """Quantises y, with straight-through gradients.

        Args:
            y: Transformed latent, in units of the quantiser's step.
            q_index: Quality levels.
            temporal, previous: Contexts, see the class.
            skip: Whether symbols with a scale index below `k_skip` are zero, as in a stream.
                Training keeps them: a coefficient that is set to zero has no gradient to come back
                by.
            worth: Bits that a squared error of y is worth, if symbols are to be chosen by their
                bits, too; this has no gradient. None rounds to the nearest.

        Returns:
            y_hat and mu (b, h, w, cy), and the symbols.
        """
        # Means and table indices come from the rounded z, the only one that a decoder has.
        z = round_ste(bound(self.hyper(y), -Z_BOUND, Z_BOUND))
        index = self.index(q_index, z, previous)
        coded = self.carries_symbol(index) if skip else 1.0

        # What is skipped is zero already here, since later passes see y_hat as the decoder does.
        def residual(mu: Array) -> Array:
            wanted = bound(y - mu, -SYMBOL_BOUND, SYMBOL_BOUND)
            if worth is None:
                return coded * round_ste(wanted)
            return coded * cheapest_symbols(wanted, sigma_from_index(index), worth)

        y_hat, mu, symbols = self.run_passes(z, temporal, residual)
        return y_hat, mu, LatentSymbols(z, symbols, index)

    def carries_symbol(self, index: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """1 where an element is written to the stream, 0 where it is skipped; no gradient."""
        return jax.lax.stop_gradient(index >= self.config.k_skip).astype(jnp.float32)

    def y_bits(self, symbols: LatentSymbols) -> Float[Array, "b h w cy"]:
        """Bits of each element of y, integers without noise. Skipped elements cost nothing."""
        bits = gaussian_bits(symbols.y, sigma_from_index(symbols.index))
        return bits * self.carries_symbol(symbols.index)

    def written_bits(
        self, symbols: LatentSymbols, q_index: Int[Array, " b"]
    ) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
        """Bits of y and z that the tables of a released model will give them; no gradient."""
        bits = _total(self.y_bits(symbols)), _total(self.density.bits(symbols.z, q_index))
        return jax.lax.stop_gradient(bits)

    def bits(
        self,
        y: Float[Array, "b h w cy"],
        mu: Float[Array, "b h w cy"],
        symbols: LatentSymbols,
        q_index: Int[Array, " b"],
        key: Key[Array, ""],
    ) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
        """Differentiable rates in bits of y and z, with uniform noise in place of rounding.

        The means and the table indices come from rounded values (see `encode`), as in a stream;
        only the values whose probability is taken carry noise.
        """
        key_y, key_z = jax.random.split(key)
        # The index carries a straight-through gradient, so this rate trains the scale network, too.
        # Elements that a stream would skip count here, since training keeps their symbols.
        noise = jax.random.uniform(key_y, y.shape, minval=-0.5, maxval=0.5)
        y_bits = gaussian_bits(y - mu + noise, sigma_from_index(symbols.index))
        # The hyperlatent of `encode` before rounding.
        z = bound(self.hyper(y), -Z_BOUND, Z_BOUND)
        noise = jax.random.uniform(key_z, z.shape, minval=-0.5, maxval=0.5)
        return _total(y_bits), _total(self.density.bits(z + noise, q_index))


def _total(x: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    """Sum over each clip."""
    return jnp.sum(x, axis=(1, 2, 3))
