"""Prediction of frames by block motion, in JAX; the same in training, coding and refinement."""

import jax
import jax.numpy as jnp
import numpy as np

from gnvc_jax.motion.field import FINE, PEL

Array = jax.Array


def interpolation(size: int, blocks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left and right block of every pixel along one axis, and the weight (size,) of the right one.

    Vectors stand at block centres; pixels beyond the outer centres take the outer vector.
    """
    position = (np.arange(size) + 0.5) / FINE - 0.5
    left = np.floor(position).astype(int)
    weight = (position - left).astype(np.float32)
    return np.clip(left, 0, blocks - 1), np.clip(left + 1, 0, blocks - 1), weight


def dense(vectors: Array) -> Array:
    """Block vectors (..., h, w, 2) in 1/16 pel -> displacements (..., 16h, 16w, 2) in pels."""
    h, w = vectors.shape[-3:-1]
    top, bottom, y = interpolation(FINE * h, h)
    left, right, x = interpolation(FINE * w, w)
    y, x = y[:, None, None], x[:, None]
    vectors = vectors.astype(jnp.float32) / PEL
    rows = vectors[..., top, :, :] * (1 - y) + vectors[..., bottom, :, :] * y
    return rows[..., left, :] * (1 - x) + rows[..., right, :] * x


def catmull_rom(t: Array) -> tuple[Array, ...]:
    """Weights of the four samples around a point, t in [0, 1) after the second one.

    The cubic convolution kernel with a = -1/2 (Keys, 1981).
    """
    return (
        ((-0.5 * t + 1.0) * t - 0.5) * t,
        (1.5 * t - 2.5) * t * t + 1.0,
        ((-1.5 * t + 2.0) * t + 0.5) * t,
        (0.5 * t - 0.5) * t * t,
    )


def warp(image: Array, displacement: Array) -> Array:
    """Samples image (b, h, w, c) at pixel + displacement (b, n, h, w, 2) -> (b, n, h, w, c).

    Bicubic (Catmull-Rom); beyond the edges the edge repeats.
    """
    b, h, w, c = image.shape
    x = jnp.arange(w) + displacement[..., 0]
    y = jnp.arange(h)[:, None] + displacement[..., 1]
    left, top = jnp.floor(x), jnp.floor(y)
    weights_x, weights_y = catmull_rom(x - left), catmull_rom(y - top)
    left, top = left.astype(jnp.int32), top.astype(jnp.int32)
    columns = [jnp.clip(left + i, 0, w - 1) for i in (-1, 0, 1, 2)]
    flat, out = image.reshape(b, h * w, c), 0.0
    for i, weight_y in zip((-1, 0, 1, 2), weights_y):
        row = jnp.clip(top + i, 0, h - 1) * w
        line = 0.0
        for column, weight_x in zip(columns, weights_x):
            index = (row + column).reshape(b, -1, 1)
            sample = jnp.take_along_axis(flat, index, axis=1, mode="promise_in_bounds")
            line += weight_x[..., None] * sample.reshape(*x.shape, c)
        out += weight_y[..., None] * line
    return out


def predict(reference: Array, vectors: Array) -> Array:
    """Frames (b, 4, h, w, 3) predicted from the last decoded frame.

    Args:
      reference: (b, h, w, 3), h and w multiples of 16.
      vectors: (b, 4, h / 16, w / 16, 2), see `gnvc_jax.motion.field.expand`.
    """
    return warp(reference, dense(vectors))


def to_eight_bits(frames: Array) -> Array:
    """Frames in [-1, 1] rounded to the 256 values that a decoder hands out."""
    return jnp.round((jnp.clip(frames, -1.0, 1.0) + 1.0) * 127.5) / 127.5 - 1.0


__all__ = ["dense", "predict", "to_eight_bits", "warp"]
