"""Peak signal-to-noise ratio on 8-bit RGB values, 10 log10(255² / mse) in dB.

A frame has one PSNR, from its mean squared error over all pixels and colours; that of a clip is the
mean over its frames in dB, as most codec papers report it, not the PSNR of the mean error.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

# In dB: identical frames have no finite PSNR, and means over frames need one.
CAP = 100.0


def mean_squared_error(x: Array | np.ndarray, y: Array | np.ndarray) -> Float32[Array, " b"]:
    """Mean squared difference of each frame.

    Args:
        x: (b, h, w, c) uint8.
        y: Frames to compare with, of the same shape.

    Returns:
        (b,) float32. Rows are summed as integers, so that large frames lose no precision.

    Raises:
        ValueError: If the shapes differ, or there are not four axes.
        TypeError: If the videos are not uint8.
    """
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(f"expected two (b, h, w, c) arrays, got {x.shape} and {y.shape}")
    if x.dtype != jnp.uint8 or y.dtype != jnp.uint8:
        raise TypeError(f"expected uint8 frames, got {x.dtype} and {y.dtype}")
    # Differences are signed, so uint8 would wrap around.
    # A row of 3 colours sums up to 3 * 255² per pixel, which fits 32 bits for 22,000 pixels.
    difference = jnp.asarray(x, jnp.int32) - jnp.asarray(y, jnp.int32)
    rows = jnp.sum(jnp.square(difference).astype(jnp.uint32), axis=(2, 3))
    samples = x.shape[2] * x.shape[3]
    return jnp.mean(rows.astype(jnp.float32) / samples, axis=1)


def decibels(mse: Float[Array | np.ndarray | np.generic, "*b"]) -> Float[Array, "*b"]:
    """10 log10(255² / mse), at most 100."""
    floor = 255.0**2 * 10.0 ** (-CAP / 10)
    return 10.0 * jnp.log10(255.0**2 / jnp.maximum(jnp.asarray(mse), floor))


def psnr(x: Array | np.ndarray, y: Array | np.ndarray) -> Float32[Array, " b"]:
    """PSNR of each frame in dB, at most 100; arguments and errors of `mean_squared_error`."""
    return decibels(mean_squared_error(x, y))
