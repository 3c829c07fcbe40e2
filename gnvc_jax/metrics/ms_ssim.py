"""SSIM and multi-scale SSIM, batched and differentiable.

Wang, Simoncelli and Bovik, "Multi-scale structural similarity for image quality assessment", 2003:
five scales, an 11-tap Gaussian window of sigma 1.5 without border, K = (0.01, 0.03). Negative terms
count as 0, odd sides are padded with a zero before halving, and colour planes are averaged last, as
the package pytorch-msssim does.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Real

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents by scale, finest first; sum 1
TAPS = 11
MIN_SIDE = (TAPS - 1) * 2 ** (len(WEIGHTS) - 1) + 1  # leaves a full window at the last scale

# In float64 until it is applied, so that it sums to 1 after rounding.
_WINDOW = np.exp(-((np.arange(TAPS) - TAPS // 2) ** 2) / (2 * 1.5**2))
_WINDOW /= _WINDOW.sum()


def ssim(
    x: Array | np.ndarray, y: Array | np.ndarray, data_range: float = 255.0
) -> Float32[Array, " b"]:
    """Single-scale SSIM of each frame, mean of the colour planes.

    Args:
        x: (b, h, w, c), values 0..data_range, any real dtype, both sides at least 11.
        y: Frames to compare with, of the same shape.
        data_range: Difference between white and black.

    Returns:
        (b,) float32, 1 for identical frames.

    Raises:
        ValueError: If the shapes differ, there are not four axes, or a side is too short.
    """
    _check(x, y, TAPS)
    return jnp.mean(_similarity(_planes(x), _planes(y), data_range)[0], axis=1)


def ms_ssim(
    x: Array | np.ndarray, y: Array | np.ndarray, data_range: float = 255.0
) -> Float32[Array, " b"]:
    """MS-SSIM of each frame; arguments and errors of `ssim`, but both sides at least 161."""
    _check(x, y, MIN_SIDE)
    x, y = _planes(x), _planes(y)
    product = jnp.ones(())
    for scale, weight in enumerate(WEIGHTS):
        # Luminance counts at the coarsest scale alone, contrast and structure at all of them.
        full, contrast = _similarity(x, y, data_range)
        last = scale == len(WEIGHTS) - 1
        product *= _power(full if last else contrast, weight)
        if not last:
            x, y = _downsample(x), _downsample(y)
    return jnp.mean(product, axis=1)


def _check(x: Array | np.ndarray, y: Array | np.ndarray, shortest: int) -> None:
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(f"expected two (b, h, w, c) arrays, got {x.shape} and {y.shape}")
    if min(x.shape[1:3]) < shortest:
        raise ValueError(f"sides must be at least {shortest}, got {x.shape[1]}x{x.shape[2]}")


def _planes(x: Real[Array | np.ndarray, "b h w c"]) -> Float32[Array, "b c h w"]:
    """(b, h, w, c) to float32 (b, c, h, w), where filtering along rows reads adjacent memory."""
    return jnp.moveaxis(jnp.asarray(x, jnp.float32), -1, 1)


def _similarity(
    x: Float32[Array, "b c h w"], y: Float32[Array, "b c h w"], data_range: float
) -> tuple[Float32[Array, "b c"], Float32[Array, "b c"]]:
    """Spatial means (b, c) of the full SSIM and of its contrast-structure factor."""
    # K1 and K2 of the paper: they keep quotients stable where means or variances vanish.
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    # All five in one pass, (5, b, c, h, w).
    moments = _blur(jnp.stack([x, y, x * x, y * y, x * y]))
    mx, my, xx, yy, xy = moments
    # Variances and covariance as E[xy] - E[x] E[y], under the Gaussian window of each position.
    contrast = (2 * (xy - mx * my) + c2) / (xx - mx * mx + yy - my * my + c2)
    full = contrast * (2 * mx * my + c1) / (mx * mx + my * my + c1)
    return jnp.mean(full, axis=(2, 3)), jnp.mean(contrast, axis=(2, 3))


def _blur(x: Float32[Array, "*batch h w"]) -> Float32[Array, "*batch h2 w2"]:
    """Separable Gaussian over the last two axes, valid part only.

    Shifted sums instead of a convolution: float32 exactly on every backend, where convolutions
    may round to fewer bits and so destroy the small differences that variances are.
    """
    for axis in (-2, -1):
        size = x.shape[axis] - TAPS + 1
        shifted = (
            jax.lax.slice_in_dim(x, k, k + size, axis=axis) * np.float32(weight)
            for k, weight in enumerate(_WINDOW)
        )
        x = functools.reduce(jnp.add, shifted)
    return x


def _downsample(x: Float32[Array, "b c h w"]) -> Float32[Array, "b c h2 w2"]:
    """2x2 mean; an odd side gets a zero in front."""
    x = jnp.pad(x, ((0, 0), (0, 0), (x.shape[2] % 2, 0), (x.shape[3] % 2, 0)))
    return 0.25 * (
        x[..., 0::2, 0::2] + x[..., 0::2, 1::2] + x[..., 1::2, 0::2] + x[..., 1::2, 1::2]
    )


def _power(x: Float32[Array, "b c"], exponent: float) -> Float32[Array, "b c"]:
    """max(x, 0) ** exponent with a gradient that stays finite at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.where(positive, x, 1.0) ** exponent, 0.0)
