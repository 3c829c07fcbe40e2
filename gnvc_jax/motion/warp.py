"""Prediction of frames by block motion, in JAX; training, coding and refinement share it.

`predict` is what the codec calls: vectors per block and frame, and the last decoded frame, give
four predicted frames. It interpolates the vectors (`dense`) and samples the frame (`warp`).
`to_eight_bits` makes frames in training what they are in use.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from gnvc_jax.arrays import AnyArray
from gnvc_jax.motion.field import FINE, PEL


def interpolation(blocks: int) -> np.ndarray:
    """Weights (16 * blocks, blocks) of linear interpolation from block centres to pixels on a line.

    Pixels beyond the outer centres take the value of the outer block.
    """
    # Pixel centres in units of blocks, counted from the centre of the first block.
    position = (np.arange(FINE * blocks) + 0.5) / FINE - 0.5
    position = np.clip(position, 0, blocks - 1)[:, None]
    return np.maximum(1.0 - np.abs(position - np.arange(blocks)), 0.0).astype(np.float32)


def dense(vectors: Shaped[AnyArray, "*b h w 2"]) -> Float[Array, "*b 16*h 16*w 2"]:
    """Interpolates block vectors in 1/16 pel to the displacements of all pixels in pels."""
    h, w = vectors.shape[-3:-1]
    vectors = jnp.asarray(vectors, jnp.float32) / PEL
    # Products of matrices, mostly of zeros, which compilers keep apart from what follows: XLA fuses
    # slices and sums into each of the 16 gathers of `warp`, and computes them as often.
    with jax.default_matmul_precision("highest"):
        rows = jnp.einsum("yh,...hwc->...ywc", interpolation(h), vectors)
        return jnp.einsum("xw,...ywc->...yxc", interpolation(w), rows)


def cubic_convolution(t: Array, a: float) -> tuple[Array, ...]:
    """Weights of the four samples around a point, at t in [0, 1) after the second one.

    The kernel of Keys ("Cubic convolution interpolation for digital image processing", 1981), in
    Horner's form; a is its slope at distance 1. With a = -1/2 (Catmull-Rom) it is exact for
    parabolas; the smaller a, the more it sharpens.
    """
    return (
        ((a * t - 2 * a) * t + a) * t,
        ((a + 2) * t - (a + 3)) * t * t + 1.0,
        ((-(a + 2) * t + (2 * a + 3)) * t - a) * t,
        (-a * t + a) * t * t,
    )


def warp(
    image: Float[AnyArray, "b h w c"], displacement: Float[AnyArray, "b n h w 2"], a: float
) -> Float[Array, "b n h w c"]:
    """Samples an image at pixel + displacement, by bicubic interpolation.

    Args:
        image: Image to sample; beyond its edges, the edge pixels repeat.
        displacement: Displacements (dx, dy) in pels, for each of n results.
        a: Parameter of `cubic_convolution`.

    Returns:
        The n displaced images.
    """
    b, h, w, c = image.shape
    x = jnp.arange(w) + displacement[..., 0]
    y = jnp.arange(h)[:, None] + displacement[..., 1]
    # Coordinates in the image, (b, n, h, w), split into whole pixels and fractions.
    left, top = jnp.floor(x), jnp.floor(y)
    weights_x, weights_y = cubic_convolution(x - left, a), cubic_convolution(y - top, a)
    left, top = left.astype(jnp.int32), top.astype(jnp.int32)
    columns = [jnp.clip(left + i, 0, w - 1) for i in (-1, 0, 1, 2)]
    # A gather over flattened pixels, 16 times: row by row of the 4x4 neighbourhood. Indices are
    # clipped above, so that the gather need not check them.
    flat, rows = jnp.asarray(image).reshape(b, h * w, c), []
    for i, weight_y in zip((-1, 0, 1, 2), weights_y):
        row = jnp.clip(top + i, 0, h - 1) * w
        line = 0.0
        for column, weight_x in zip(columns, weights_x):
            # (b, n, h, w) -> (b, n * h * w, 1), one pixel for each result and position.
            index = (row + column).reshape(b, -1, 1)
            sample = jnp.take_along_axis(flat, index, axis=1, mode="promise_in_bounds")
            line += weight_x[..., None] * sample.reshape(*x.shape, c)
        rows.append(weight_y[..., None] * line)
    return functools.reduce(operator.add, rows)


def predict(
    reference: Float[AnyArray, "b h w 3"], vectors: Shaped[AnyArray, "b 4 h2 w2 2"], a: float
) -> Float[Array, "b 4 h w 3"]:
    """Predicts four frames from the last decoded frame.

    Args:
        reference: Last decoded frame; h and w are multiples of 16.
        vectors: Vectors of every frame and 16x16 block, see `gnvc_jax.motion.field.expand`.
        a: Parameter of `cubic_convolution`, `CodecConfig.motion_kernel` of the codec.
    """
    # Displacements (b, 4, h, w, 2).
    return warp(reference, dense(vectors), a)


def to_eight_bits(frames: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Rounds frames in [-1, 1] to the 256 values that a decoder outputs. Has no gradient."""
    # Decoders predict from uint8 frames, so training does, too.
    steps = jnp.round((jnp.clip(frames, -1.0, 1.0) + 1.0) * 127.5)
    return jax.lax.stop_gradient(steps / 127.5 - 1.0)


__all__ = ["dense", "predict", "to_eight_bits", "warp"]
