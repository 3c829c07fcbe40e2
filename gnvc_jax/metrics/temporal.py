"""Temporal fidelity and flicker of a clip, without any pretrained network.

With x the source, y the output, luma on 0..255 (BT.709 weights on 8-bit RGB) and
d_t(a) = a_{t+1} - a_t:

    tpsnr     10 log10(255² / mean |d(y) - d(x)|²): fidelity of change, in dB, at most 100
    ti_ratio  mean_t std(d_t(y)) / mean_t std(d_t(x)): temporal information (ITU-T P.910); below 1
              is smoothed or frozen, above 1 flickers
    pulse     root mean square, over t and blocks of 16x16, of the block mean of d_t(y - x): slow
              breathing and jumps of brightness; noise averages out of it
    seam      mean of D at the borders of groups over the median of D elsewhere, where
              D_t = mean |d_t(y - x)|²: 1 is a border that does not show
    drift     slope of the PSNR over the frames, and the mean of the last frames less the first

None says enough alone: blur, noise and a frozen picture each pass one of them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from gnvc_jax.metrics.psnr import decibels

BLOCK = 16
ENDS = 8  # frames at either end that drift compares
_LUMA = (0.2126, 0.7152, 0.0722)  # R, G, B of BT.709


def temporal(x: Array | np.ndarray, y: Array | np.ndarray) -> dict[str, jax.Array]:
    """Temporal fidelity of a clip.

    Args:
        x: Source, (t, h, w, 3) uint8, at least 2 frames and sides of at least 16. Rows and columns
            beyond the last whole block are left out of `pulse`.
        y: Output, of the same shape.

    Returns:
        tpsnr, ti_ratio (NaN for a still source) and pulse, float32 scalars, and changes (t - 1,),
        the D of `seam`.

    Raises:
        ValueError: If the shapes are wrong.
    """
    if x.shape != y.shape or x.ndim != 4 or x.shape[-1] != 3:
        raise ValueError(f"expected two (t, h, w, 3) arrays, got {x.shape} and {y.shape}")
    if x.shape[0] < 2 or min(x.shape[1:3]) < BLOCK:
        raise ValueError(f"needs 2 frames and sides of {BLOCK}, got {x.shape}")
    x, y = jnp.asarray(x), jnp.asarray(y)

    def step(t: jax.Array) -> tuple[jax.Array, ...]:
        # Differences of integers, so that equal frames differ by exactly nothing.
        dx, dy = (v[t + 1].astype(jnp.int32) - v[t] for v in (x, y))
        error = _luma(dy - dx)
        return (
            _mean(jnp.square(error)),
            _standard_deviation(_luma(dx)),
            _standard_deviation(_luma(dy)),
            _pulse(error),
        )

    # One pair of frames at a time, so that memory does not grow with the clip; (t - 1,) each.
    square, source, output, pulse = jax.lax.map(step, jnp.arange(x.shape[0] - 1))
    return {
        "tpsnr": decibels(jnp.mean(square)),
        "ti_ratio": jnp.mean(output) / jnp.mean(source),
        "pulse": jnp.sqrt(jnp.mean(pulse)),
        "changes": square,
    }


def seam(changes: Array | np.ndarray, starts: Sequence[int]) -> float:
    """How much more the error changes at borders of groups than elsewhere.

    Args:
        changes: (t - 1,) from `temporal`.
        starts: First frames of the groups; 0 is ignored.

    Returns:
        Ratio of the mean change at borders to the median elsewhere. NaN if there are no borders or
        nothing but borders, 1 if the error never changes, infinite if it changes at borders only.
    """
    at = np.zeros(len(changes), bool)
    # Change t leads from frame t to t + 1, so a border before frame n is change n - 1.
    at[[start - 1 for start in starts if 0 < start <= len(changes)]] = True
    if at.all() or not at.any():
        return float("nan")
    there, elsewhere = np.mean(changes[at]), np.median(changes[~at])
    return float(there / elsewhere) if elsewhere else (1.0 if not there else float("inf"))


def drift(psnr: Sequence[float | int] | np.ndarray) -> dict[str, float]:
    """Change of the PSNR along a clip.

    Args:
        psnr: PSNR of each frame in dB.

    Returns:
        psnr_slope, the slope of the least-squares line in dB per frame (NaN below 2 frames), and
        psnr_end_change, the mean of the last eight frames minus that of the first eight (NaN below
        16 frames).
    """
    t, nan = len(psnr), float("nan")
    return {
        "psnr_slope": float(np.polyfit(np.arange(t), psnr, 1)[0]) if t > 1 else nan,
        "psnr_end_change": float(np.mean(psnr[-ENDS:]) - np.mean(psnr[:ENDS]))
        if t >= 2 * ENDS
        else nan,
    }


def _luma(rgb: Int32[Array, "h w 3"]) -> Float32[Array, "h w"]:
    r, g, b = (rgb[..., c].astype(jnp.float32) * weight for c, weight in enumerate(_LUMA))
    return r + g + b


def _mean(plane: Float32[Array, "h w"]) -> Float32[Array, ""]:
    """Mean in two stages, which loses less precision than one long float32 sum."""
    return jnp.mean(jnp.mean(plane, axis=1))


def _standard_deviation(plane: Float32[Array, "h w"]) -> Float32[Array, ""]:
    return jnp.sqrt(_mean(jnp.square(plane - _mean(plane))))


def _pulse(error: Float32[Array, "h w"]) -> Float32[Array, ""]:
    """Mean square of the block means."""
    rows, columns = (side // BLOCK for side in error.shape)
    # (rows, 16, columns, 16), averaged over both axes of 16.
    blocks = error[: rows * BLOCK, : columns * BLOCK].reshape(rows, BLOCK, columns, BLOCK)
    return jnp.mean(jnp.square(jnp.mean(blocks, axis=(1, 3))))
