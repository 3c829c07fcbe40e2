"""Wan2.1's video DiT, with or without VACE's context adapter.

Latents (b, t, h, w, c) are normalised per channel; tokens are (b, n, d) with n = (w/2) t (h/2),
column outermost, so that a video sharded along its width stays so. Attention has no mask, and the
rotary embedding follows the tokens, hence their order changes nothing else.

Parameters are float32; matrix products and attention run in `dtype`. The residual stream, all
norms, modulation, the time path, rotation and the head are float32, as in the original under
autocast; products of the time path and the head, which cost little, have full precision everywhere.

Reference: Wan2.1 ``wan/modules/model.py``, ``vace_model.py`` and diffusers ``transformer_wan.py``,
``transformer_wan_vace.py`` (Apache-2.0).
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gnvc_jax.errors import UsageError
from gnvc_jax.parallel import axis_size, constrain
from gnvc_jax.refiner.attention import attention, windowed_attention
from gnvc_jax.refiner.config import PATCH, DiTConfig

Array = jax.Array

EPSILON = 1e-6
SMALL = nn.initializers.normal(0.02)
XAVIER = nn.initializers.xavier_uniform()

# What the backward pass keeps of each block; the rest is computed again.
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "matmuls": jax.checkpoint_policies.save_only_these_names("attention", "qkv", "ffn"),
}


def patchify(latents: Array) -> Array:
    """(b, t, h, w, c) -> (b, (w/2) t (h/2), 4c)."""
    return rearrange(latents, "b t (h p) (w q) c -> b (w t h) (p q c)", p=PATCH, q=PATCH)


def unpatchify(tokens: Array, t: int, h: int, w: int) -> Array:
    """Undoes `patchify`; t, h, w: sizes of the latents."""
    sizes = {"t": t, "h": h // PATCH, "w": w // PATCH, "p": PATCH, "q": PATCH}
    return rearrange(tokens, "b (w t h) (p q c) -> b t (h p) (w q) c", **sizes)


def shard_tokens(tokens: Array) -> Array:
    """Tokens (b, n, d) over the mesh axis `context`; zero rows fill them up to a multiple."""
    rest = -tokens.shape[1] % axis_size("context")
    return constrain(jnp.pad(tokens, ((0, 0), (0, rest), (0, 0))), batch=0, context=1)


def rotary_table(head_width: int, t: int, h: int, w: int) -> tuple[Array, Array]:
    """Cosines and sines (n, 1, head_width / 2) of the tokens of latents (t, h, w).

    The pairs of a head are shared out to time, row and column; pair p of an axis that has d numbers
    turns by position * 10000^(-2p/d).
    """
    side = 2 * (head_width // 6)
    sizes = {"t": t, "h": h // PATCH, "w": w // PATCH}
    angles = []
    for axis, count in sizes.items():
        d = head_width - 2 * side if axis == "t" else side
        angle = np.arange(count)[:, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
        angles.append(jnp.stack([np.cos(angle), np.sin(angle)]).astype(jnp.float32))
    grid = [
        repeat(a, f"two {axis} d -> two (w t h) 1 d", **sizes) for axis, a in zip("thw", angles)
    ]
    cosine, sine = jnp.concatenate(grid, axis=-1)
    return cosine, sine


def rotate(x: Array, table: tuple[Array, Array]) -> Array:
    """Turn neighbouring pairs of x (b, n, heads, d), in float32; tokens after the table's stay."""
    rest = ((0, x.shape[1] - table[0].shape[0]), (0, 0), (0, 0))
    cosine, sine = jnp.pad(table[0], rest, constant_values=1.0), jnp.pad(table[1], rest)
    a, b = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    y = jnp.stack([a * cosine - b * sine, a * sine + b * cosine], axis=-1)
    return y.reshape(x.shape).astype(x.dtype)


def sinusoid(time: Array, width: int) -> Array:
    """Wan timestep (b,) -> (b, width): cosines, then sines, of time * 10000^(-2i/width)."""
    frequency = jnp.asarray(10000.0 ** (-np.arange(0, width, 2) / width), jnp.float32)
    angle = time.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def layer_norm(x: Array) -> Array:
    """(x - mean) / sqrt(variance + 1e-6) over the last axis, in float32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON)


def dense(features: int, dtype: jnp.dtype, name: str, init=XAVIER) -> nn.Dense:
    return nn.Dense(features, dtype=dtype, kernel_init=init, name=name)


def exact_dense(features: int, name: str, init=XAVIER) -> nn.Dense:
    """A float32 layer whose products TPUs and GPUs do not round."""
    return nn.Dense(features, kernel_init=init, name=name, precision="highest")


class HeadsNorm(nn.Module):
    """RMS norm over all heads together, in float32: x / sqrt(mean(x^2) + 1e-6) * scale."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        mean = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        return (x32 * lax.rsqrt(mean + EPSILON) * scale).astype(x.dtype)


class DiTAttention(nn.Module):
    """Tokens x (b, n, d) attend to tokens y (b, m, d); rotation of both where a table is given.

    grid: (latents, rows, columns) of tokens that attend to their neighbourhood (`config.window`),
    None for attention to all tokens.
    """

    config: DiTConfig
    dtype: jnp.dtype
    implementation: str | None
    grid: tuple[int, int, int] | None = None

    @nn.compact
    def __call__(self, x: Array, y: Array, table: tuple[Array, Array] | None) -> Array:
        def heads(name, x):
            x = checkpoint_name(dense(self.config.width, self.dtype, name)(x), "qkv")
            if name != "v":
                x = HeadsNorm(name=f"norm_{name}")(x)
            x = rearrange(x, "b n (h d) -> b n h d", h=self.config.heads)
            return x if table is None or name == "v" else rotate(x, table)

        q, k, v = heads("q", x), heads("k", y), heads("v", y)
        if self.grid:
            y = windowed_attention(q, k, v, self.grid, self.config.window, self.implementation)
        else:
            # The tokens of the clip are spread over devices; the text is the same on all.
            spread = {} if table is None else {"length": table[0].shape[0], "split_keys": True}
            y = attention(q, k, v, self.implementation, **spread)
        y = checkpoint_name(rearrange(y, "b n h d -> b n (h d)"), "attention")
        return dense(self.config.width, self.dtype, "o")(y)


class DiTBlock(nn.Module):
    """Self-attention and feed-forward, both modulated by time, cross-attention to text between.

    x (b, n, d) float32; time (b, 6, d): shift, scale, gate of attention, then of the feed-forward;
    text (b, m, d); table: of the rotary embedding.
    """

    config: DiTConfig
    dtype: jnp.dtype
    attention: str | None
    grid: tuple[int, int, int] | None = None

    @nn.compact
    def __call__(self, x: Array, time: Array, text: Array, table: tuple[Array, Array]) -> Array:
        cfg = self.config
        init = nn.initializers.normal(cfg.width**-0.5)
        time = time + self.param("modulation", init, (6, cfg.width), jnp.float32)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(time, 6, axis=1)

        y = (layer_norm(x) * (1 + scale1) + shift1).astype(self.dtype)
        attend = DiTAttention(cfg, self.dtype, self.attention, self.grid, name="self_attention")
        y = attend(y, y, table)
        x = x + gate1 * y

        if cfg.text_length:
            y = layer_norm(x) * self.param("cross_scale", nn.initializers.ones, (cfg.width,))
            y = y + self.param("cross_bias", nn.initializers.zeros, (cfg.width,))
            cross = DiTAttention(cfg, self.dtype, self.attention, name="cross_attention")
            x = x + cross(y.astype(self.dtype), text, None)

        y = layer_norm(x) * (1 + scale2) + shift2
        y = checkpoint_name(dense(cfg.ffn_width, self.dtype, "ffn_in")(y), "ffn")
        y = dense(cfg.width, self.dtype, "ffn_out")(nn.gelu(y, approximate=True))
        return x + gate2 * y


class DiTGroup(nn.Module):
    """One context block, if the model has an adapter, and the blocks up to the next one.

    The carry is (x, context), both (b, n, d); scale: weight of the hint that the context block
    gives to the first block's output.
    """

    config: DiTConfig
    dtype: jnp.dtype
    attention: str | None
    remat: str
    grid: tuple[int, int, int] | None = None

    @nn.compact
    def __call__(self, carry, scale, time, text, table):
        (x, context), cfg, block = carry, self.config, DiTBlock
        x = constrain(x, batch=0, context=1)
        if self.remat != "none":
            block = nn.remat(DiTBlock, policy=REMAT[self.remat], prevent_cse=False)
        hint = 0.0
        if cfg.context_every:
            context = block(cfg, self.dtype, self.attention, self.grid, name="context")(
                context, time, text, table
            )
            hint = dense(cfg.width, self.dtype, "context_out", nn.initializers.zeros)(context)
        for i in range(cfg.group_size):
            one = block(cfg, self.dtype, self.attention, self.grid, name=f"block_{i}")
            x = one(x, time, text, table)
            x = x + scale * hint if i == 0 else x
        return (x, context), None


class DiT(nn.Module):
    """The velocity field of Wan2.1: noise minus data, at Wan's timestep (1000 noise, 0 data).

    config: sizes; dtype: of matrix products and attention; attention: implementation (see
    `gnvc_jax.refiner.attention`), by default the backend's best; remat: a key of REMAT.
    """

    config: DiTConfig
    dtype: jnp.dtype = jnp.float32
    attention: str | None = None
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        latents: Array,
        time: Array,
        text: Array | None = None,
        context: Array | None = None,
        context_scale: float | Array = 1.0,
        *,
        time_extra: Array | float = 0.0,
        context_extra: Array | float = 0.0,
    ) -> Array:
        """Velocity (b, t, h, w, c) float32.

        latents (b, t, h, w, c), h and w even; time (b,) in 0..1000; text (b, m, text_width) with
        m <= text_length, zero rows are added; context (b, t, h, w, context_channels), wanted by a
        model with an adapter; context_scale: weight of the hints, one or one per context block;
        time_extra (b, width), context_extra (b, n, width): added to the embeddings of time and of
        the context's tokens.

        Raises UsageError for sizes that do not fit.
        """
        cfg = self.config
        check_sizes(cfg, latents, text, context)
        _, t, h, w, _ = latents.shape
        n = cfg.tokens(t, h, w)
        x = shard_tokens(patchify(latents))
        x = dense(cfg.width, self.dtype, "patch_embedding")(x).astype(jnp.float32)

        time = exact_dense(cfg.width, "time_in", SMALL)(sinusoid(time, cfg.frequencies))
        time = exact_dense(cfg.width, "time_out", SMALL)(nn.silu(time)) + time_extra
        rows = exact_dense(6 * cfg.width, "time_modulation")(nn.silu(time))
        rows = constrain(rearrange(rows, "b (six d) -> b six d", six=6), batch=0)

        if cfg.text_length:
            text = jnp.pad(text, ((0, 0), (0, cfg.text_length - text.shape[1]), (0, 0)))
            text = nn.gelu(dense(cfg.width, self.dtype, "text_in", SMALL)(text), approximate=True)
            text = constrain(dense(cfg.width, self.dtype, "text_out", SMALL)(text), batch=0)

        tokens = None
        if cfg.context_every:
            tokens = dense(cfg.width, self.dtype, "context_embedding")(patchify(context))
            first = dense(cfg.width, self.dtype, "context_in", nn.initializers.zeros)
            tokens = first(shard_tokens(tokens + context_extra)) + x

        grid = (t, h // PATCH, w // PATCH) if cfg.window else None
        groups = nn.scan(
            DiTGroup,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=cfg.groups,
        )(cfg, self.dtype, self.attention, self.remat, grid, name="groups")
        table = rotary_table(cfg.head_width, t, h, w)
        scale = jnp.broadcast_to(jnp.asarray(context_scale, jnp.float32), (cfg.groups,))
        (x, _), _ = groups((x, tokens), scale, rows, text, table)

        init = nn.initializers.normal(cfg.width**-0.5)
        modulation = self.param("head_modulation", init, (2, cfg.width), jnp.float32)
        shift, scale = jnp.split(modulation + time[:, None], 2, axis=1)
        x = layer_norm(x) * (1 + scale) + shift
        x = exact_dense(PATCH**2 * cfg.channels, "head", nn.initializers.zeros)(x)
        return unpatchify(x[:, :n], t, h, w)


def check_sizes(cfg: DiTConfig, latents: Array, text: Array | None, context: Array | None) -> None:
    """UsageError that says which input does not fit the model."""
    b, t, h, w, c = latents.shape
    if c != cfg.channels or h % PATCH or w % PATCH:
        raise UsageError(
            f"latents {latents.shape}: expected {cfg.channels} channels, even height and width"
        )
    expected = (b, cfg.text_length, cfg.text_width) if cfg.text_length else None
    found = None if text is None else text.shape
    fits = found == expected or (found and expected and found[::2] == expected[::2])
    if not fits or (found and found[1] > expected[1]):
        raise UsageError(f"text {found}: expected {expected}, or fewer rows")
    expected = (b, t, h, w, cfg.context_channels) if cfg.context_every else None
    found = None if context is None else context.shape
    if found != expected:
        raise UsageError(f"context {found}: expected {expected}")
