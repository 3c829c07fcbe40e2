"""Building blocks of the latent codec's networks. Feature maps are (b, h, w, c).

`DepthwiseBlock` is the one residual block; `DepthwiseBlocks` stacks it, `Downsample` and `Upsample`
put it behind a change of resolution. Resolution changes by rearranging space into channels and back
(`space_to_depth`, `depth_to_space`), so nothing is discarded on the way. There is no normalisation,
whose statistics would depend on the picture; residual branches start small instead
(`small_residual_init`).

Reference: DCVC-RT and DCVC-UF (microsoft/DCVC, MIT), whose depthwise-convolution blocks these are.
"""

import jax
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float, Shaped

from gnvc_jax.arrays import ArrayT
from gnvc_jax.convolution import depthwise3x3

xavier = nn.initializers.xavier_normal()
# The last convolution of a residual branch starts at a tenth of the usual amplitude: without
# normalisation, deep chains of full-strength branches overflow before they learn.
small_residual_init = nn.initializers.variance_scaling(0.01, "fan_avg", "truncated_normal")


@jax.jit  # inside a larger jit: traced once per shape rather than once per layer
def wsilu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The activation of DCVC-RT, x * sigmoid(4 x)."""
    return x * nn.sigmoid(4.0 * x)


_depthwise3x3 = jax.jit(depthwise3x3)  # for the same reason


def space_to_depth(
    x: Shaped[ArrayT, "*b h w c"],
) -> Shaped[ArrayT, "*b h//2 w//2 4*c"]:
    """Moves each 2x2 cell into channels: the four pixels row by row, channels innermost."""
    # The ellipsis stands for the batch axis, which the exported scale network does not have.
    return rearrange(x, "... (h i) (w j) c -> ... h w (i j c)", i=2, j=2)


def depth_to_space(
    x: Shaped[ArrayT, "*b h w c"],
) -> Shaped[ArrayT, "*b 2*h 2*w c//4"]:
    """Undoes `space_to_depth`."""
    return rearrange(x, "... h w (i j c) -> ... (h i) (w j) c", i=2, j=2)


def dense(
    features: int, name: str | None = None, kernel_init: nn.initializers.Initializer = xavier
) -> nn.Dense:
    """A 1x1 convolution."""
    return nn.Dense(features, kernel_init=kernel_init, name=name)


class DepthwiseConv(nn.Module):
    """Depthwise 3x3 convolution with bias."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        c = x.shape[-1]
        # Nine taps of variance 1/9 keep the variance of the input.
        kernel = self.param("kernel", nn.initializers.normal(1 / 3), (3, 3, c))
        return _depthwise3x3(x, kernel) + self.param("bias", nn.initializers.zeros, (c,))


class DepthwiseBlock(nn.Module):
    """Residual block c -> features: mixes space by a depthwise convolution, then mixes channels.

    Attributes:
        features: Channels of the output; if the input has others, a 1x1 convolution comes first.
        reduction: Divides the hidden widths (1: the full block of DCVC-RT, 2: the half block).
    """

    features: int
    reduction: int = 2

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w features"]:
        # Half blocks (reduction 2) have half the weights of DCVC-RT's.
        f, hidden = self.features, self.features // self.reduction
        if x.shape[-1] != f:
            x = dense(f, "adaptor")(x)
        # First residual branch: the only place where neighbouring positions meet.
        y = wsilu(dense(hidden, "space_in")(x))
        x = x + dense(f, "space_out", small_residual_init)(DepthwiseConv(name="space")(y))
        # DCVC-RT's channel mixer: hidden units are summed in fours, which narrows the layer
        # without weights. (b, h, w, 4 * hidden) -> (b, h, w, hidden).
        y = wsilu(dense(4 * hidden, "channel_in")(x))
        # As a product with zeros and ones: on CPUs, XLA takes ten times as long for sums of four.
        y = y @ np.repeat(np.eye(hidden, dtype=y.dtype), 4, axis=0)
        return x + dense(f, "channel_out", small_residual_init)(y)


class DepthwiseBlocks(nn.Module):
    """A chain of `depth` residual blocks, all `features` wide."""

    features: int
    depth: int
    reduction: int = 2

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w features"]:
        for i in range(self.depth):
            x = DepthwiseBlock(self.features, self.reduction, name=f"block{i}")(x)
        return x


class Downsample(nn.Module):
    """Halves height and width: 2x2 cells to channels, a 1x1 convolution, a residual block."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h//2 w//2 features"]:
        # (b, h/2, w/2, 4c) -> (b, h/2, w/2, features).
        x = dense(self.features, "mix")(space_to_depth(x))
        return DepthwiseBlock(self.features, name="block")(x)


class Upsample(nn.Module):
    """Doubles height and width: a 1x1 convolution, channels to 2x2 cells, a residual block."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w features"]:
        # (b, h, w, 4 * features) -> (b, 2h, 2w, features).
        x = depth_to_space(dense(4 * self.features, "mix")(x))
        return DepthwiseBlock(self.features, name="block")(x)
