"""Convolutions of frames, each in the form that suits the backend.

Networks call `conv2d`, `conv3d` and `conv2d_of_doubled` and do not know what they run on. Each asks
`strategy()`, once per trace, which set of implementations to use:

- `DIRECT`, for GPUs and TPUs: one XLA convolution per call.
- `CPU`: XLA's 3-D convolution and its kernel gradients are slow there. Wide 3x3 kernels use
  Winograd's algorithm (`gnvc_jax.winograd`), others are sums of 2-D convolutions, and work whose
  result is known to be zero is left out.

Both compute the same function up to float rounding. `conv_in_time` and `depthwise3x3` have one form
for all backends: few taps, each a matrix product or a multiply-add.

Videos are (b, t, h, w, c), kernels (taps in time, rows, columns, c, o); all kernels are applied as
in deep learning, that is, not flipped.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax import lax
from jaxtyping import Array, Float, Shaped

from gnvc_jax import winograd
from gnvc_jax.arrays import AnyArray, ArrayT
from gnvc_jax.parallel import backend

# From this many input and output channels on, Winograd's algorithm is worth its compilation on CPU.
WINOGRAD_CHANNELS = 64
SAME = ((1, 1), (1, 1))  # padding of rows and columns that keeps the size under a 3x3 kernel

Padding = Sequence[tuple[int, int]]


class Strategy(NamedTuple):
    """The implementations of the three convolutions that depend on the backend."""

    conv2d: Callable[..., Array]
    conv3d: Callable[..., Array]
    conv2d_of_doubled: Callable[..., Array]


def strategy() -> Strategy:
    """Returns the implementations for the backend that is traced for."""
    return CPU if backend() == "cpu" else DIRECT


def conv2d(
    x: Float[AnyArray, "b t h w c"],
    kernel: Float[AnyArray, "kh kw c o"],
    *,
    stride: int = 1,
    padding: Padding = SAME,
) -> Float[Array, "b t h2 w2 o"]:
    """Convolves every frame in space.

    Args:
        x: Frames.
        kernel: Weights, applied to each frame.
        stride: Stride of rows and columns.
        padding: Number of zero rows above and below, and of zero columns left and right.
    """
    # The strategy is chosen while tracing, not while running.
    return strategy().conv2d(jnp.asarray(x), jnp.asarray(kernel), stride, padding)


def conv3d(
    x: Float[AnyArray, "b t h w c"], kernel: Float[AnyArray, "kt kh kw c o"], zeros: int = 0
) -> Float[Array, "b t2 h w o"]:
    """Convolves in time and space, 'valid' in time and 'same' in space.

    Args:
        x: Frames, the oldest first.
        kernel: Weights; kh and kw are odd.
        zeros: Number of zero frames before x. Passing the number instead of padding lets the CPU
            skip the taps that would see nothing else.

    Returns:
        t + zeros - kt + 1 frames.
    """
    return strategy().conv3d(jnp.asarray(x), jnp.asarray(kernel), zeros)


def conv2d_of_doubled(
    x: Float[AnyArray, "b t h w c"], kernel: Float[AnyArray, "3 3 c o"]
) -> Float[Array, "b t 2*h 2*w o"]:
    """Doubles rows and columns (nearest neighbour), then convolves every frame by a 3x3 kernel."""
    return strategy().conv2d_of_doubled(jnp.asarray(x), jnp.asarray(kernel))


def conv_in_time(
    x: Float[AnyArray, "b t h w c"],
    kernel: Float[AnyArray, "kt 1 1 c o"],
    *,
    zeros: int = 0,
    stride: int = 1,
) -> Float[Array, "b t2 h w o"]:
    """Convolves along time alone, 'valid': one matrix product per tap on every backend.

    Args:
        x: Frames, the oldest first.
        kernel: Weights.
        zeros: Number of zero frames before x.
        stride: Output j begins at frame stride * j.

    Returns:
        (t + zeros - kt) // stride + 1 frames.
    """
    # Tap k of output j sees frame stride * j + k, so each tap is a strided slice of the frames.
    x = jnp.pad(x, ((0, 0), (zeros, 0), (0, 0), (0, 0), (0, 0)))
    taps = len(kernel)
    span = (x.shape[1] - taps) // stride * stride + 1  # frames from the first to the last output
    outputs = (x[:, k : k + span : stride] @ kernel[k, 0, 0] for k in range(taps))
    return functools.reduce(operator.add, outputs)


def depthwise3x3(
    x: Shaped[ArrayT, "*b h w c"], kernel: Shaped[ArrayT, "3 3 c"]
) -> Shaped[ArrayT, "*b h w c"]:
    """Convolves each channel by a 3x3 kernel with zero padding, as nine shifted multiply-adds.

    The result is exact for integers whose sums stay below 2**24, in any order of summation, in
    float32 and in integer types; a library convolution (Winograd, FFT) does not promise that. The
    function works on JAX and on NumPy arrays.
    """
    # `numpy` or `jax.numpy`, whichever the array belongs to.
    xp: Any = x.__array_namespace__()
    *batch, h, w, _ = x.shape
    padded = xp.pad(x, [(0, 0)] * len(batch) + [(1, 1), (1, 1), (0, 0)])
    taps = [(i, j) for i in range(3) for j in range(3)]
    return functools.reduce(
        operator.add, (padded[..., i : i + h, j : j + w, :] * kernel[i, j] for i, j in taps)
    )


# --- Direct: one XLA convolution per call -----------------------------------------------------


def _xla_conv2d(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """XLA's convolution of pictures (n, h, w, c)."""
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _direct_conv2d(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    frames = rearrange(x, "b t h w c -> (b t) h w c")
    y = _xla_conv2d(frames, kernel, stride, padding)
    return rearrange(y, "(b t) h w c -> b t h w c", b=len(x))


def _direct_conv3d(x: Array, kernel: Array, zeros: int) -> Array:
    _, kh, kw, *_ = kernel.shape
    return lax.conv_general_dilated(
        # Padding in time is explicit, since it is on one side only.
        jnp.pad(x, ((0, 0), (zeros, 0), (0, 0), (0, 0), (0, 0))),
        kernel,
        window_strides=(1, 1, 1),
        padding=((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2)),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


def _direct_conv2d_of_doubled(x: Array, kernel: Array) -> Array:
    doubled = repeat(x, "b t h w c -> b t (h 2) (w 2) c")
    return _direct_conv2d(doubled, kernel, 1, SAME)


DIRECT = Strategy(_direct_conv2d, _direct_conv3d, _direct_conv2d_of_doubled)


# --- CPU: Winograd, sums of 2-D convolutions, kernel gradients as matrix products --------------


def _suits_winograd(x: Array, kernel: Array) -> bool:
    """Whether Winograd's algorithm is faster; bfloat16 would not survive its transforms."""
    *_, kh, kw, c, o = kernel.shape
    wide = (kh, kw) == (3, 3) and min(c, o) >= WINOGRAD_CHANNELS
    return wide and x.dtype == jnp.float32


def _cpu_conv2d(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    # What follows is for stride 1.
    if stride != 1:
        return _direct_conv2d(x, kernel, stride, padding)
    if padding == SAME and _suits_winograd(x, kernel):
        return winograd.conv3d(x, kernel[None], 0)
    frames = rearrange(x, "b t h w c -> (b t) h w c")
    y = cast(Array, _conv2d_fast_gradient(frames, kernel, padding))
    return rearrange(y, "(b t) h w c -> b t h w c", b=len(x))


def _cpu_conv3d(x: Array, kernel: Array, zeros: int) -> Array:
    kt, kh, kw, *_ = kernel.shape
    t = x.shape[1] + zeros - kt + 1  # frames of output
    # Taps that lie before the first frame of x at every output see zeros only.
    silent = max(0, zeros - t + 1)
    kernel, kt, zeros = kernel[silent:], kt - silent, zeros - silent
    if _suits_winograd(x, kernel):
        return winograd.conv3d(x, kernel, zeros)
    outputs = []
    for k in range(kt):
        missing = max(0, zeros - k)  # leading outputs for which this tap sees zeros
        # Output j sees frame j + k - zeros of x at this tap.
        seen = x[:, max(0, k - zeros) : k - zeros + t]
        # One 2-D convolution over all frames that the tap sees; missing outputs are zero.
        tap = _cpu_conv2d(seen, kernel[k], 1, ((kh // 2, kh // 2), (kw // 2, kw // 2)))
        outputs.append(jnp.pad(tap, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0))))
    return functools.reduce(operator.add, outputs)


def _cpu_conv2d_of_doubled(x: Array, kernel: Array) -> Array:
    """Computes `conv2d_of_doubled` as four 2x2 convolutions of the small image.

    This takes 2.25 times less work.

    An output pixel sees four input pixels, whatever its place; the nine weights add up to four in
    one of four ways, by whether its row and its column are even or odd.
    """
    # merge[parity of the output, tap of the small kernel, original weight]
    # Output row 2y + p sees rows 2y + p - 1 to 2y + p + 1 of the doubled image: y - 1, y, y if p is
    # 0, and y, y, y + 1 if p is 1.
    merge = jnp.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], kernel.dtype)
    kernels = jnp.einsum("pri,qsj,ijco->pqrsco", merge, merge, kernel)

    def outputs(p: int, q: int) -> Array:
        return _cpu_conv2d(x, kernels[p, q], 1, ((1 - p, p), (1 - q, q)))

    # (b, t, h, w, q, o) for each p, stacked to (b, t, h, p, w, q, o).
    rows = [jnp.stack([outputs(p, q) for q in (0, 1)], axis=4) for p in (0, 1)]
    return rearrange(jnp.stack(rows, axis=3), "b t h p w q o -> b t (h p) (w q) o")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv2d_fast_gradient(x: Array, kernel: Array, padding: Padding) -> Array:
    """Does the same as `_xla_conv2d` with stride 1, with a kernel gradient of matrix products.

    XLA's own kernel gradient is two to three times slower on CPU for 32 to 64 channels.
    """
    return _xla_conv2d(x, kernel, 1, padding)


def _fast_gradient_forward(
    x: Array, kernel: Array, padding: Padding
) -> tuple[Array, tuple[Array, Array]]:
    return _xla_conv2d(x, kernel, 1, padding), (x, kernel)


def _fast_gradient_backward(
    padding: Padding, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    # Only the kernel gradient is replaced.
    dx = jax.vjp(lambda x: _xla_conv2d(x, kernel, 1, padding), x)[1](dy)[0]
    kh, kw, c, o = kernel.shape
    _, h, w, _ = dy.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    # What each tap saw, as a matrix (pixels of all frames, c).
    taps = (x[:, i : i + h, j : j + w].reshape(-1, c) for i in range(kh) for j in range(kw))
    dkernel = jnp.stack([tap.T @ dy.reshape(-1, o) for tap in taps])
    return dx, dkernel.reshape(kernel.shape)


_conv2d_fast_gradient.defvjp(_fast_gradient_forward, _fast_gradient_backward)

CPU = Strategy(_cpu_conv2d, _cpu_conv3d, _cpu_conv2d_of_doubled)
