"""Temporal fidelity and flicker of a clip, without any pretrained network.

With x the source, y the output, luma on 0..255 (BT.709 weights on 8-bit RGB) and
d_t(a) = a_{t+1} - a_t:

    tpsnr     10 log10(255² / mean |d(y) - d(x)|²): fidelity of change, in dB, at most 100
    ti_ratio  mean_t std(d_t(y)) / mean_t std(d_t(x)): temporal information (ITU-T P.910); below 1
              is smoothed or frozen, above 1 flickers
    pulse     root mean square, over t and blocks of 16x16, of the block mean of d_t(y - x): slow
              breathing and jumps of brightness; noise averages out of it

None says enough alone: blur, noise and a frozen picture each pass one of them.
"""

import jax
import jax.numpy as jnp

from gnvc_jax.metrics.psnr import decibels

BLOCK = 16
_LUMA = (0.2126, 0.7152, 0.0722)


def temporal(x: jax.Array, y: jax.Array) -> dict[str, jax.Array]:
    """The three measures of a clip.

    Args:
        x, y: source and output, (t, h, w, 3) uint8, at least 2 frames and sides of at least 16;
            rows and columns beyond the last whole block are left out of `pulse`.

    Returns:
        tpsnr, ti_ratio (NaN where the source stands still) and pulse, float32 scalars.

    Raises:
        ValueError: wrong shapes.
    """
    if x.shape != y.shape or x.ndim != 4 or x.shape[-1] != 3:
        raise ValueError(f"expected two (t, h, w, 3) arrays, got {x.shape} and {y.shape}")
    if x.shape[0] < 2 or min(x.shape[1:3]) < BLOCK:
        raise ValueError(f"needs 2 frames and sides of {BLOCK}, got {x.shape}")

    def step(t):
        dx, dy = _luma(x[t + 1]) - _luma(x[t]), _luma(y[t + 1]) - _luma(y[t])
        error = dy - dx
        return _mean(jnp.square(error)), _deviation(dx), _deviation(dy), _pulse(error)

    # One pair of frames at a time, so that memory does not grow with the clip.
    square, source, output, pulse = jax.lax.map(step, jnp.arange(x.shape[0] - 1))
    return {
        "tpsnr": decibels(jnp.mean(square)),
        "ti_ratio": jnp.mean(output) / jnp.mean(source),
        "pulse": jnp.sqrt(jnp.mean(pulse)),
    }


def _luma(frame: jax.Array) -> jax.Array:
    r, g, b = (frame[..., c].astype(jnp.float32) * weight for c, weight in enumerate(_LUMA))
    return r + g + b


def _mean(plane: jax.Array) -> jax.Array:
    """In two stages, which loses less than one long sum."""
    return jnp.mean(jnp.mean(plane, axis=1))


def _deviation(plane: jax.Array) -> jax.Array:
    return jnp.sqrt(_mean(jnp.square(plane - _mean(plane))))


def _pulse(error: jax.Array) -> jax.Array:
    """Mean square of the block means."""
    rows, columns = (side // BLOCK for side in error.shape)
    blocks = error[: rows * BLOCK, : columns * BLOCK].reshape(rows, BLOCK, columns, BLOCK)
    return jnp.mean(jnp.square(jnp.mean(blocks, axis=(1, 3))))
