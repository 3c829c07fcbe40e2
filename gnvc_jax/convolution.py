"""Convolutions of frames, each in the form that suits the backend.

XLA's 3-D convolution and its kernel gradients are slow on CPU; `gnvc_jax.winograd` and sums of 2-D
convolutions stand in for them there.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax import lax

from gnvc_jax import winograd
from gnvc_jax.parallel import backend

Array = jax.Array

# From this many input and output channels on, Winograd's algorithm is worth its compilation on CPU.
WINOGRAD_CHANNELS = 64
SAME = ((1, 1), (1, 1))  # padding of a 3x3 kernel


def _worth_winograd(x: Array, kernel: Array) -> bool:
    *_, kh, kw, c, o = kernel.shape
    wide = (kh, kw) == (3, 3) and min(c, o) >= WINOGRAD_CHANNELS
    return wide and x.dtype == jnp.float32 and backend() == "cpu"


def conv2d(x: Array, kernel: Array, *, stride: int = 1, padding=SAME) -> Array:
    """2-D convolution of every frame: x (b, t, h, w, c), kernel (kh, kw, c, o)."""
    if (stride, padding) == (1, SAME) and _worth_winograd(x, kernel):
        return winograd.conv3d(x, kernel[None], 0)
    b = x.shape[0]
    x = rearrange(x, "b t h w c -> (b t) h w c")
    if stride == 1 and backend() == "cpu":
        y = _conv_of_frames(x, kernel, padding)
    else:
        y = _conv(x, kernel, stride, padding)
    return rearrange(y, "(b t) h w c -> b t h w c", b=b)


def _conv(x: Array, kernel: Array, stride: int, padding) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_of_frames(x: Array, kernel: Array, padding) -> Array:
    """`_conv` with stride 1 whose kernel gradient is one matrix product per tap.

    XLA's own kernel gradient is two to three times slower on CPU for 32 to 64 channels.
    """
    return _conv(x, kernel, 1, padding)


def _conv_forward(x, kernel, padding):
    return _conv(x, kernel, 1, padding), (x, kernel)


def _conv_backward(padding, saved, dy):
    x, kernel = saved
    dx = jax.vjp(lambda x: _conv(x, kernel, 1, padding), x)[1](dy)[0]
    kh, kw, c, o = kernel.shape
    _, h, w, _ = dy.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    taps = (x[:, i : i + h, j : j + w].reshape(-1, c) for i in range(kh) for j in range(kw))
    dkernel = jnp.stack([tap.T @ dy.reshape(-1, o) for tap in taps])
    return dx, dkernel.reshape(kernel.shape)


_conv_of_frames.defvjp(_conv_forward, _conv_backward)


def conv3d(x: Array, kernel: Array, zeros: int = 0) -> Array:
    """3-D convolution, 'same' in space and 'valid' in time: (b, t + kt - 1, ...) -> (b, t, ...).

    The first `zeros` frames of x are left out and count as zero. XLA's 3-D convolution is slow on
    CPU: there, wide 3x3 kernels go by Winograd's algorithm, others are the sum of one 2-D
    convolution per time tap, and taps that only see zeros cost nothing. Other backends get the 3-D
    convolution.
    """
    kt, kh, kw, *_ = kernel.shape
    space = ((kh // 2, kh // 2), (kw // 2, kw // 2))
    if backend() != "cpu":
        x = jnp.pad(x, ((0, 0), (zeros, 0), (0, 0), (0, 0), (0, 0)))
        return lax.conv_general_dilated(
            x, kernel, (1, 1, 1), ((0, 0), *space), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )
    t = x.shape[1] + zeros - kt + 1
    silent = max(0, zeros - t + 1)  # taps before the first frame of x at every output
    kernel, kt, zeros = kernel[silent:], kt - silent, zeros - silent
    if _worth_winograd(x, kernel):
        return winograd.conv3d(x, kernel, zeros)
    y = 0
    for k in range(kt):
        missing = max(0, zeros - k)  # leading outputs for which this tap sees zeros
        tap = conv2d(x[:, max(0, k - zeros) : k - zeros + t], kernel[k], padding=space)
        y = y + jnp.pad(tap, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))
    return y


def conv2d_of_doubled(x: Array, kernel: Array) -> Array:
    """3x3 convolution of x (b, t, h, w, c) after nearest-neighbour doubling of rows and columns.

    An output sees four input pixels whatever its place. On CPU, outputs in even and odd rows and
    columns are therefore four 2x2 convolutions of x, whose weights are sums: 2.25 times less work.
    """
    if backend() != "cpu":
        return conv2d(repeat(x, "b t h w c -> b t (h 2) (w 2) c"), kernel)
    # parity of the output, tap, original weight
    merge = jnp.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], kernel.dtype)
    kernels = jnp.einsum("pri,qsj,ijco->pqrsco", merge, merge, kernel)
    rows = (
        jnp.stack([conv2d(x, kernels[p, q], padding=((1 - p, p), (1 - q, q))) for q in (0, 1)], 4)
        for p in (0, 1)
    )
    return rearrange(jnp.stack(list(rows), 3), "b t h p w q o -> b t (h p) (w q) o")
