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


@jax.custom_vjp
def predict(reference: Array, vectors: Array) -> Array:
    """Predicts four frames from the last decoded frame.

    Its gradient with respect to `reference` is approximate: the adjoint of a warp scatters, which
    costs many times the warp itself, so the gradient is warped back along the negated vectors
    instead. Away from the borders that is exact for a translation, because the interpolation kernel
    is symmetric, and close to exact where vectors change slowly.

    Args:
      reference: (b, h, w, 3), h and w multiples of 16.
      vectors: (b, 4, h / 16, w / 16, 2), see `gnvc_jax.motion.field.expand`.

    Returns:
      (b, 4, h, w, 3).
    """
    return warp(reference, dense(vectors))


def _predict_forward(reference: Array, vectors: Array) -> tuple[Array, Array]:
    return predict(reference, vectors), vectors


def _predict_backward(vectors: Array, gradient: Array) -> tuple[Array, np.ndarray]:
    b, n, h, w, c = gradient.shape
    # Each of the four gradients is a picture of its own with one field: (b * 4, 1, h, w, 2).
    back = -dense(vectors).reshape(b * n, 1, h, w, 2)
    pulled = warp(gradient.reshape(b * n, h, w, c), back).reshape(gradient.shape)
    return pulled.sum(1), np.zeros(vectors.shape, jax.dtypes.float0)


predict.defvjp(_predict_forward, _predict_backward)


def to_eight_bits(frames: Array) -> Array:
    """Rounds frames in [-1, 1] to the 256 values that a decoder hands out.

    The gradient passes straight through the rounding and stops where values are clipped.
    """
    frames = jnp.clip(frames, -1.0, 1.0)
    rounded = jnp.round((frames + 1.0) * 127.5) / 127.5 - 1.0
    return frames + jax.lax.stop_gradient(rounded - frames)


__all__ = ["dense", "predict", "to_eight_bits", "warp"]
