"""Layers of the causal video VAEs of Wan2.1 and Wan2.2.

Every layer maps (b, t, h, w, c) to the same layout. Layers that look back in time keep the frames
they need in the Flax collection ``cache``: the call with ``first=True`` starts from nothing and may
process any number of frames, a later call with ``first=False`` continues where the previous one
stopped. The cache is written only when the caller makes the collection mutable, so the whole-clip
pass (one ``first=True`` call) carries no state at all.

`gnvc_jax.vae.model` puts these layers together; `gnvc_jax.convolution` decides how the convolutions
are computed.

Reference: Wan2.1 ``wan/modules/vae.py``, Wan2.2 ``wan/modules/vae2_2.py`` and diffusers
``autoencoder_kl_wan.py`` (Apache-2.0).
"""

import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from gnvc_jax.convolution import conv2d, conv2d_of_doubled, conv3d, conv_in_time

# Attention scores of at most this many (query, key) pairs are held in memory at once.
SCORES_IN_MEMORY = 1 << 24


def prepend_history(
    module: nn.Module, x: Float[Array, "b t h w c"], frames: int, first: bool
) -> tuple[Float[Array, "b t2 h w c"], int]:
    """Puts the frames before x, which a causal convolution sees, in front of x.

    The last `frames` frames of the result become the module's cache.

    Args:
        module: Module that the cache belongs to.
        x: New frames.
        frames: Length of the history.
        first: Whether a clip starts here.

    Returns:
        History and x, and the number of frames of history that are missing and count as zeros: at
        the start of a clip, all of them.
    """
    # Zeros at the start of a clip are counted rather than concatenated, so that `conv3d` can skip
    # the taps that would see nothing else.
    zeros = frames if first else 0
    if not first:
        x = jnp.concatenate([module.get_variable("cache", "past"), x], axis=1)
    if module.is_mutable_collection("cache"):
        # The cache always has `frames` frames, however few have been seen: its shape must not
        # change under a scan. x includes the old history here, so short chunks keep part of it.
        missing = max(0, frames - x.shape[1])
        past = jnp.pad(x, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))
        module.put_variable("cache", "past", past[:, past.shape[1] - frames :])
    return x, zeros


class ConvBase(nn.Module):
    """Base of the convolutions: a kernel and a bias in float32, cast to the compute type.

    Attributes:
        features: Channels of the output.
        dtype: Type that the convolution is computed in.
        kernel_init: Initialiser of the kernel.
    """

    features: int
    dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    def weights(self, x: Array, window: tuple[int, ...]) -> tuple[Array, Array]:
        """Makes kernel (*window, c, features) and bias (features,) for an input (..., c)."""
        # Parameters stay in float32, so that small updates are not lost; only products use `dtype`.
        shape = (*window, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return jnp.asarray(kernel, self.dtype), jnp.asarray(bias, self.dtype)


def last_tap_init(
    key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> Float[Array, "kt kh kw c o"]:
    """Draws a kernel that is zero but for the last tap in time, which sees the present frame.

    An untrained network thus treats frames one by one, and taps that short training clips never
    reach stay zero in long ones.
    """
    newest = nn.initializers.lecun_normal()(key, shape[1:], dtype)
    return jnp.zeros(shape, dtype).at[-1].set(newest)


class CausalConv(ConvBase):
    """3-D convolution that sees the present frame and those before it.

    Attributes:
        window: Number of taps in time, rows and columns.
    """

    kernel_init: nn.initializers.Initializer = last_tap_init
    window: tuple[int, int, int] = (3, 3, 3)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w c"], first: bool
    ) -> Float[Array, "b t h w features"]:
        kernel, bias = self.weights(x, self.window)
        x, zeros = prepend_history(self, x, self.window[0] - 1, first)
        return conv3d(x, kernel, zeros) + bias


class SpatialDownsample(ConvBase):
    """3x3 convolution with stride 2, padded by one zero row below and one zero column right."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h//2 w//2 features"]:
        kernel, bias = self.weights(x, (3, 3))
        return conv2d(x, kernel, stride=2, padding=((0, 1), (0, 1))) + bias


class SpatialUpsample(ConvBase):
    """Nearest-neighbour doubling of rows and columns, then a 3x3 convolution."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t 2*h 2*w features"]:
        kernel, bias = self.weights(x, (3, 3))
        return conv2d_of_doubled(x, kernel) + bias


class TemporalDownsample(ConvBase):
    """Halves the frame rate: 1 + 2m frames -> 1 + m at the start of a clip, 2m -> m later.

    Frame 0 of a clip passes untouched; output j after it sees frames 2j-2, 2j-1 and 2j of the clip.
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w c"], first: bool
    ) -> Float[Array, "b t2 h w features"]:
        kernel, bias = self.weights(x, (3, 1, 1))
        # What passes untouched: frame 0 of a clip, or no frame.
        head = x[:, :1] if first else x[:, :0]
        if not first:
            x = jnp.concatenate([self.get_variable("cache", "past"), x], axis=1)
        if self.is_mutable_collection("cache"):
            self.put_variable("cache", "past", x[:, -1:])
        # Frame 0 is the first frame that output 1 sees, so it stays in x. Strided outputs need one
        # frame of history, since 2m new frames make m windows of three that overlap by one.
        y = conv_in_time(x, kernel, stride=2) + bias
        return jnp.concatenate([head, y], axis=1)


class TemporalUpsample(ConvBase):
    """Doubles the frame rate: 1 + n frames -> 1 + 2n at the start of a clip, n -> 2n later.

    Frame 0 of a clip passes untouched and is never seen by the convolution: Wan keeps zeros in its
    place in the history.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], first: bool) -> Float[Array, "b t2 h w c2"]:
        kernel, bias = self.weights(x, (3, 1, 1))
        # Frame 0 does not enter x, nor therefore the history.
        head, x = (x[:, :1], x[:, 1:]) if first else (x[:, :0], x)
        x, zeros = prepend_history(self, x, 2, first)
        y = conv_in_time(x, kernel, zeros=zeros) + bias
        # Twice the channels become two frames.
        y = rearrange(y, "b n h w (two c) -> b (n two) h w c", two=2)
        return jnp.concatenate([head, y], axis=1)


def average_down(
    x: Float[Array, "b t h w c"], features: int, frames: int, size: int, first: bool
) -> Float[Array, "b t2 h//{size} w//{size} {features}"]:
    """Wan2.2's shortcut around a level of the encoder: moves blocks into channels, averages these.

    Args:
        x: Input of the level.
        features: Channels of the output; they divide frames * size^2 * c.
        frames, size: Frames, rows and columns that become one position.
        first: Whether a clip starts here: its first frame then follows zeros.
    """
    missing = (frames - 1) * first
    x = jnp.pad(x, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))
    # All values of a block of one channel lie side by side, so mostly these are averaged.
    x = rearrange(x, "b (t f) (h i) (w j) c -> b t h w (c f i j)", f=frames, i=size, j=size)
    return reduce(x, "b t h w (o group) -> b t h w o", "mean", o=features)


def duplicate_up(
    x: Float[Array, "b t h w c"], features: int, frames: int, size: int, first: bool
) -> Float[Array, "b t2 h*{size} w*{size} {features}"]:
    """Wan2.2's shortcut around a level of the decoder: copies channels, moves them into blocks.

    Args:
        x: Input of the level.
        features: Channels of the output, such that c divides frames * size^2 * features.
        frames, size: Frames, rows and columns that each position becomes.
        first: Whether a clip starts here: only the last of its first `frames` frames is real.
    """
    copies = frames * size**2 * features // x.shape[-1]
    x = repeat(x, "b t h w c -> b t h w (c copies)", copies=copies)
    x = rearrange(x, "b t h w (o f i j) -> b (t f) (h i) (w j) o", f=frames, i=size, j=size)
    return x[:, frames - 1 :] if first else x


class ChannelRMSNorm(nn.Module):
    """Wan's RMS norm, x / max(|x|, 1e-12) * sqrt(c) * gamma over channels, in float32.

    Unlike `flax.linen.RMSNorm` it bounds the norm from below instead of adding an epsilon. It is
    written with rsqrt so that the gradient at an all-zero channel vector is finite.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        c = x.shape[-1]
        gamma = self.param("gamma", nn.initializers.ones, (c,), jnp.float32)
        x32 = x.astype(jnp.float32)
        # 1e-24 bounds the squared norm, hence 1e-12 the norm.
        square = jnp.sum(x32 * x32, axis=-1, keepdims=True)
        return (x32 * lax.rsqrt(jnp.maximum(square, 1e-24)) * (c**0.5) * gamma).astype(x.dtype)


class ResidualBlock(nn.Module):
    """Residual block: x -> s(x) + conv(silu(norm(conv(silu(norm(x)))))).

    s is a 1x1x1 convolution if widths differ, else the identity. The last convolution starts at
    zero, so that an untrained network is a chain of linear maps.

    Attributes:
        features: Channels of the output.
        dtype: Type that convolutions are computed in.
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w c"], first: bool
    ) -> Float[Array, "b t h w features"]:
        # Each causal convolution has a cache of its own, under its name.
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

    Queries are processed row by row, or several rows or frames at a time where the scores of these
    do not exceed SCORES_IN_MEMORY.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        b, _, h, w, c = x.shape
        qkv = nn.Dense(3 * c, dtype=self.dtype, name="to_qkv")(ChannelRMSNorm(name="norm")(x))
        # One head as wide as the features. Frames do not see each other: they join the batch.
        q, k, v = jnp.split(rearrange(qkv, "b t h w c -> (b t) h w c"), 3, axis=-1)
        k, v = (rearrange(y, "n h w c -> n (h w) c") for y in (k, v))

        def attend_frame(qkv: tuple[Array, Array, Array]) -> Array:
            q, k, v = qkv  # of one frame: (h, w, c), (h * w, c), (h * w, c)

            def attend_row(q: Float[Array, "w c"]) -> Float[Array, "w c"]:
                # (w, h * w). Scores and softmax in float32, whatever `dtype` is.
                scores = jnp.einsum("qc,kc->qk", q, k, preferred_element_type=jnp.float32)
                return nn.softmax(scores * c**-0.5).astype(self.dtype) @ v

            # A row of queries has w * (h * w) scores, a frame (h * w)^2. If one frame is too large,
            # it is worked off by rows, and frames one at a time.
            rows = max(1, min(h, SCORES_IN_MEMORY // (h * w * w)))
            return lax.map(attend_row, q, batch_size=rows)

        frames = max(1, SCORES_IN_MEMORY // (h * w) ** 2)
        y = lax.map(attend_frame, (q, k, v), batch_size=frames)
        y = rearrange(y, "(b t) h w c -> b t h w c", b=b)
        return x + nn.Dense(c, dtype=self.dtype, name="proj")(y)
