"""Layers of the Wan2.1 causal video VAE.

Every layer maps (b, t, h, w, c) to the same layout. Layers that look back in time keep the frames
they need in the Flax collection ``cache``: the call with ``first=True`` starts from nothing and may
process any number of frames, a later call with ``first=False`` continues where the previous one
stopped. The cache is written only when the caller makes the collection mutable, so the whole-clip
pass (one ``first=True`` call) carries no state at all.

Reference: Wan2.1 ``wan/modules/vae.py`` and diffusers ``autoencoder_kl_wan.py`` (Apache-2.0).
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax import lax

from gnvc_jax.convolution import conv2d, conv2d_of_doubled, conv3d

Array = jax.Array

# Attention scores of at most this many (query, key) pairs are held in memory at once.
SCORES_IN_MEMORY = 1 << 24


def prepend_history(module: nn.Module, x: Array, frames: int, first: bool) -> tuple[Array, int]:
    """x after the `frames` frames that came before it, and how many of these are left out.

    At the start of a clip nothing came before: all are left out and stand for zeros. The last
    `frames` frames become the module's cache.
    """
    zeros = frames if first else 0
    if not first:
        x = jnp.concatenate([module.get_variable("cache", "past"), x], axis=1)
    if module.is_mutable_collection("cache"):
        missing = max(0, frames - x.shape[1])
        past = jnp.pad(x, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))
        module.put_variable("cache", "past", past[:, past.shape[1] - frames :])
    return x, zeros


class ConvBase(nn.Module):
    """Base of the convolutions: a kernel and a bias in float32, cast to the compute type."""

    features: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    def weights(self, x: Array, window: tuple[int, ...]) -> tuple[Array, Array]:
        shape = (*window, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return kernel.astype(self.dtype), bias.astype(self.dtype)


def last_tap_init(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """Initial kernel (kt, kh, kw, c, o) that only sees the present frame.

    An untrained network thus treats frames one by one, and taps that short training clips never
    reach stay silent in long ones.
    """
    newest = nn.initializers.lecun_normal()(key, shape[1:], dtype)
    return jnp.zeros(shape, dtype).at[-1].set(newest)


class CausalConv(ConvBase):
    """3-D convolution that sees the present and the past: (b, t, h, w, c) -> (b, t, h, w, o)."""

    kernel_init: nn.initializers.Initializer = last_tap_init
    window: tuple[int, int, int] = (3, 3, 3)

    @nn.compact
    def __call__(self, x: Array, first: bool) -> Array:
        kernel, bias = self.weights(x, self.window)
        x, zeros = prepend_history(self, x, self.window[0] - 1, first)
        return conv3d(x, kernel, zeros) + bias


class SpatialDownsample(ConvBase):
    """3x3 convolution with stride 2, padded by one zero row below and one zero column right."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel, bias = self.weights(x, (3, 3))
        return conv2d(x, kernel, stride=2, padding=((0, 1), (0, 1))) + bias


class SpatialUpsample(ConvBase):
    """Nearest-neighbour doubling of rows and columns, then a 3x3 convolution."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel, bias = self.weights(x, (3, 3))
        return conv2d_of_doubled(x, kernel) + bias


class TemporalDownsample(ConvBase):
    """Halves the frame rate: 1 + 2m frames -> 1 + m at the start of a clip, 2m -> m later.

    Frame 0 passes untouched; output j sees input frames 2j-2, 2j-1 and 2j.
    """

    @nn.compact
    def __call__(self, x: Array, first: bool) -> Array:
        kernel, bias = self.weights(x, (3, 1, 1))
        head = x[:, :1] if first else x[:, :0]
        if not first:
            x = jnp.concatenate([self.get_variable("cache", "past"), x], axis=1)
        if self.is_mutable_collection("cache"):
            self.put_variable("cache", "past", x[:, -1:])
        even, odd = x[:, 0::2], x[:, 1::2]
        taps = (even[:, :-1], odd, even[:, 1:])
        y = sum(tap @ kernel[k, 0, 0] for k, tap in enumerate(taps)) + bias
        return jnp.concatenate([head, y], axis=1)


class TemporalUpsample(ConvBase):
    """Doubles the frame rate: 1 + n frames -> 1 + 2n at the start of a clip, n -> 2n later.

    Frame 0 passes untouched and is never seen by the convolution: its place in the history is zero.
    """

    @nn.compact
    def __call__(self, x: Array, first: bool) -> Array:
        kernel, bias = self.weights(x, (3, 1, 1))
        head, x = (x[:, :1], x[:, 1:]) if first else (x[:, :0], x)
        n = x.shape[1]
        x, zeros = prepend_history(self, x, 2, first)
        x = jnp.pad(x, ((0, 0), (zeros, 0), (0, 0), (0, 0), (0, 0)))
        y = sum(x[:, k : k + n] @ kernel[k, 0, 0] for k in range(3)) + bias
        y = rearrange(y, "b n h w (two c) -> b (n two) h w c", two=2)
        return jnp.concatenate([head, y], axis=1)


class ChannelRMSNorm(nn.Module):
    """x / max(|x|, 1e-12) * sqrt(c) * gamma over channels, computed in float32.

    Written with rsqrt so that the gradient at an all-zero channel vector is finite.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = x.shape[-1]
        gamma = self.param("gamma", nn.initializers.ones, (c,), jnp.float32)
        x32 = x.astype(jnp.float32)
        square = jnp.sum(x32 * x32, axis=-1, keepdims=True)
        return (x32 * lax.rsqrt(jnp.maximum(square, 1e-24)) * (c**0.5) * gamma).astype(x.dtype)


class ResidualBlock(nn.Module):
    """x -> s(x) + conv(silu(norm(conv(silu(norm(x)))))), s a 1x1x1 convolution if widths differ.

    The last convolution starts at zero, so that an untrained network is a chain of linear maps.
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, first: bool) -> Array:
        y = nn.silu(ChannelRMSNorm(name="norm1")(x))
        y = CausalConv(self.features, self.dtype, name="conv1")(y, first)
        y = nn.silu(ChannelRMSNorm(name="norm2")(y))
        y = CausalConv(self.features, self.dtype, nn.initializers.zeros, name="conv2")(y, first)
        if x.shape[-1] != self.features:
            shortcut = CausalConv(self.features, self.dtype, window=(1, 1, 1), name="shortcut")
            x = shortcut(x, first)
        return x + y


class FrameAttention(nn.Module):
    """Single-head self-attention over the positions of each frame, with a residual.

    Queries are processed in blocks of rows so that the scores never exceed SCORES_IN_MEMORY.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, _, h, w, c = x.shape
        qkv = nn.Dense(3 * c, dtype=self.dtype, name="to_qkv")(ChannelRMSNorm(name="norm")(x))
        q, k, v = jnp.split(rearrange(qkv, "b t h w c -> (b t) h w c"), 3, axis=-1)
        k, v = (rearrange(y, "n h w c -> n (h w) c") for y in (k, v))

        def row(args):
            q, k, v = args  # (h, w, c), (s, c), (s, c) of one frame

            def attend(q):  # (w, c): one row of queries
                scores = jnp.einsum("qc,kc->qk", q, k, preferred_element_type=jnp.float32)
                return nn.softmax(scores * c**-0.5).astype(self.dtype) @ v

            return lax.map(attend, q, batch_size=max(1, min(h, SCORES_IN_MEMORY // (h * w * w))))

        y = lax.map(row, (q, k, v), batch_size=max(1, SCORES_IN_MEMORY // (h * w) ** 2))
        y = rearrange(y, "(b t) h w c -> b t h w c", b=b)
        return x + nn.Dense(c, dtype=self.dtype, name="proj")(y)
