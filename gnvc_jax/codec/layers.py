"""Building blocks of the latent codec. Feature maps are (b, h, w, c).

Reference: DCVC-RT and DCVC-UF (microsoft/DCVC, MIT): depthwise-convolution residual blocks without
normalisation.
"""

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import linen as nn

Array = jax.Array
xavier = nn.initializers.xavier_normal()
# The last convolution of a residual branch starts small: without normalisation layers, deep chains
# of full-strength branches would overflow before they learn.
small_residual_init = nn.initializers.variance_scaling(0.01, "fan_avg", "truncated_normal")


@jax.jit  # traced once per shape, not once per layer; so below
def wsilu(x: Array) -> Array:
    """x * sigmoid(4x)."""
    return x * nn.sigmoid(4.0 * x)


@jax.jit
def depthwise3x3(x: Array, kernel: Array) -> Array:
    """Depthwise 3x3 convolution with zero padding, as nine shifted multiply-adds.

    x (b, h, w, c), kernel (3, 3, c). Exact for integers whose sums stay below 2**24, in any order
    and any type, which a library convolution (Winograd, FFT) does not promise.
    """
    _, h, w, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [(i, j) for i in range(3) for j in range(3)]
    return sum(x[:, i : i + h, j : j + w] * kernel[i, j] for i, j in taps)


def dense(features: int, name: str | None = None, kernel_init=xavier) -> nn.Dense:
    """A 1x1 convolution."""
    return nn.Dense(features, kernel_init=kernel_init, name=name)


class DepthwiseConv(nn.Module):
    """Depthwise 3x3 convolution with bias."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.normal(1 / 3), (3, 3, c))
        return depthwise3x3(x, kernel) + self.param("bias", nn.initializers.zeros, (c,))


class DepthwiseBlock(nn.Module):
    """Residual block c -> features: mix space by a depthwise convolution, then mix channels.

    `reduction` narrows the hidden widths (1: the full block, 2: the half block).
    """

    features: int
    reduction: int = 2

    @nn.compact
    def __call__(self, x: Array) -> Array:
        f, hidden = self.features, self.features // self.reduction
        if x.shape[-1] != f:
            x = dense(f, "adaptor")(x)
        y = wsilu(dense(hidden, "space_in")(x))
        x = x + dense(f, "space_out", small_residual_init)(DepthwiseConv(name="space")(y))
        y = wsilu(dense(4 * hidden, "channel_in")(x))
        y = reduce(y, "b h w (c four) -> b h w c", "sum", four=4)
        return x + dense(f, "channel_out", small_residual_init)(y)


class DepthwiseBlocks(nn.Module):
    """`depth` residual blocks, all `features` wide."""

    features: int
    depth: int
    reduction: int = 2

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.depth):
            x = DepthwiseBlock(self.features, self.reduction, name=f"block{i}")(x)
        return x


class Downsample(nn.Module):
    """Space to depth by 2, 1x1, residual block."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = rearrange(x, "b (h i) (w j) c -> b h w (i j c)", i=2, j=2)
        return DepthwiseBlock(self.features, name="block")(dense(self.features, "mix")(x))


class Upsample(nn.Module):
    """1x1 to four times the width, depth to space by 2, residual block."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = dense(4 * self.features, "mix")(x)
        x = rearrange(x, "b h w (i j c) -> b (h i) (w j) c", i=2, j=2)
        return DepthwiseBlock(self.features, name="block")(x)
