"""Wan2.1's video DiT, with or without VACE's context adapter.

`DiT` is the whole network; it scans `DiTGroup`, which consists of `DiTBlock`, which uses
`DiTAttention` twice. `gnvc_jax.refiner.model` conditions it on the codec.

Latents (b, t, h, w, c) are normalised per channel; tokens are (b, n, d) with n = (w/2) t (h/2),
column outermost, so that a video sharded along its width stays so. Because attention has no mask
and the rotary embedding is permuted with the tokens, their order does not affect the result.

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
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gnvc_jax.arrays import AnyArray
from gnvc_jax.errors import UsageError
from gnvc_jax.parallel import axis_size, constrain
from gnvc_jax.refiner.attention import attention, windowed_attention
from gnvc_jax.refiner.config import PATCH, DiTConfig

EPSILON = 1e-6  # of all norms
# Wan initialises the embeddings of time and text this way, everything else by Xavier's.
SMALL = nn.initializers.normal(0.02)
XAVIER = nn.initializers.xavier_uniform()

RotaryTable = tuple[Array, Array]  # cosines and sines, see `rotary_table`

# What the backward pass keeps of each block; the rest is computed again. The names are those given
# by `checkpoint_name` below and in the attention kernels.
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    # Outputs of attention, the costliest to compute again: all else is linear in the tokens.
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    # Also projections before norm and rotation, and the feed-forward's hidden layer before GELU.
    "matmuls": jax.checkpoint_policies.save_only_these_names("attention", "qkv", "ffn"),
}


def patchify(latents: Float[AnyArray, "b t h w c"]) -> Float[Array, "b (w//2)*t*(h//2) 4*c"]:
    """Latents to tokens of 2x2 latents: column outermost, then time, then row."""
    latents = jnp.asarray(latents)
    return rearrange(latents, "b t (h p) (w q) c -> b (w t h) (p q c)", p=PATCH, q=PATCH)


def unpatchify(
    tokens: Float[Array, "b n d"], t: int, h: int, w: int
) -> Float[Array, "b {t} {h} {w} d//4"]:
    """Undoes `patchify`; t, h and w are the sizes of the latents."""
    sizes = {"t": t, "h": h // PATCH, "w": w // PATCH, "p": PATCH, "q": PATCH}
    return rearrange(tokens, "b (w t h) (p q c) -> b t (h p) (w q) c", **sizes)


def shard_tokens(tokens: Float[Array, "b n d"]) -> Float[Array, "b n2 d"]:
    """Shards tokens over the mesh axis `context`, padded with zeros to a multiple of its size."""
    rest = -tokens.shape[1] % axis_size("context")
    return constrain(jnp.pad(tokens, ((0, 0), (0, rest), (0, 0))), batch=0, context=1)


def rotary_table(head_width: int, t: int, h: int, w: int) -> RotaryTable:
    """Cosines and sines (n, 1, head_width / 2) for the tokens of latents (t, h, w).

    The pairs of a head are divided among time, row and column; pair p of an axis that has d numbers
    is rotated by position * 10000^(-2p/d).
    """
    # Rows and columns get a third each, rounded down to pairs; time gets the rest.
    # For a head width of 128: 44 numbers for time, 42 each for row and column, as in Wan.
    side = 2 * (head_width // 6)
    sizes = {"t": t, "h": h // PATCH, "w": w // PATCH}
    angles = []
    for axis, count in sizes.items():
        d = head_width - 2 * side if axis == "t" else side
        # (count, d / 2), in float64 on the host; only cosines and sines are rounded to float32.
        angle = np.arange(count)[:, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
        angles.append(jnp.stack([np.cos(angle), np.sin(angle)]).astype(jnp.float32))
    # From one axis to all tokens, in the order of `patchify`: (2, n, 1, d / 2) for each axis. The 1
    # broadcasts over heads.
    grid = [
        repeat(a, f"two {axis} d -> two (w t h) 1 d", **sizes) for axis, a in zip("thw", angles)
    ]
    cosine, sine = jnp.concatenate(grid, axis=-1)
    return cosine, sine


def rotate(x: Float[Array, "b n heads d"], table: RotaryTable) -> Float[Array, "b n heads d"]:
    """Rotates neighbouring pairs of each head, in float32; those beyond the table do not change."""
    # Padding from `shard_tokens` comes last: angle 0.
    rest = ((0, x.shape[1] - table[0].shape[0]), (0, 0), (0, 0))
    cosine, sine = jnp.pad(table[0], rest, constant_values=1.0), jnp.pad(table[1], rest)
    # Numbers 2p and 2p + 1 of a head are the complex number a + ib, times e^(i angle).
    a, b = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    y = jnp.stack([a * cosine - b * sine, a * sine + b * cosine], axis=-1)
    return y.reshape(x.shape).astype(x.dtype)


def per_token(
    rows: Float[Array, "b t k d"], grid: tuple[int, int, int]
) -> list[Float[Array, "b n d"]]:
    """Splits k rows of modulation and gives each token those of its latent.

    Args:
        rows: Rows of each latent; with t = 1 they are the same for all tokens, and n = 1.
        grid: (latents, rows, columns) of tokens.
    """
    _, h, w = grid
    found = rearrange(rows, "b t k d -> k b t d")
    if rows.shape[1] == 1:
        return list(found)
    # In the order of `patchify`. One row at a time: broadcasts, which XLA fuses into their users.
    return [shard_tokens(repeat(x, "b t d -> b (w t h) d", h=h, w=w)) for x in found]


def sinusoid(time: Float[Array, " b"], width: int) -> Float[Array, "b {width}"]:
    """Embeds Wan's timestep: cosines, then sines, of time * 10000^(-2i/width)."""
    # (width / 2,), and (b, width / 2) for the angles. Timesteps go up to 1000, so angles need the
    # digits of float32.
    frequency = jnp.asarray(10000.0 ** (-np.arange(0, width, 2) / width), jnp.float32)
    angle = time.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def layer_norm() -> nn.LayerNorm:
    """A norm in float32 without parameters; scale and shift come from the modulation.

    Two passes over x: the variance as a difference of means would lose digits.
    """
    return nn.LayerNorm(
        epsilon=EPSILON,
        dtype=jnp.float32,
        use_bias=False,
        use_scale=False,
        use_fast_variance=False,
    )


def dense(
    features: int, dtype: DTypeLike, name: str, init: nn.initializers.Initializer = XAVIER
) -> nn.Dense:
    """A layer whose products are in `dtype`."""
    return nn.Dense(features, dtype=dtype, kernel_init=init, name=name)


def exact_dense(features: int, name: str, init: nn.initializers.Initializer = XAVIER) -> nn.Dense:
    """A float32 layer whose products TPUs and GPUs do not round."""
    return nn.Dense(features, kernel_init=init, name=name, precision="highest")


class DiTAttention(nn.Module):
    """Multi-head attention of tokens x to tokens y.

    Attributes:
        config: Sizes of the DiT.
        dtype: Type of the factors of matrix products and of attention.
        implementation: See `gnvc_jax.refiner.attention.attention`.
        grid: (latents, rows, columns) of tokens that attend to their neighbourhood
            (`config.window`), None for attention to all tokens.
    """

    config: DiTConfig
    dtype: DTypeLike
    implementation: str | None
    grid: tuple[int, int, int] | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], y: Float[Array, "b m d"], table: RotaryTable | None
    ) -> Float[Array, "b n d"]:
        """Attends from x to y.

        Args:
            x: Tokens that queries are made of.
            y: Tokens that keys and values are made of.
            table: Rotary embedding for self-attention, where x and y are the tokens of a clip; None
                for cross-attention.
        """

        def heads(name: str, x: Array) -> Float[Array, "b n heads d"]:
            # (b, n, d), heads side by side.
            x = checkpoint_name(dense(self.config.width, self.dtype, name)(x), "qkv")
            if name != "v":
                # Over all heads together, before they are split, as in Wan.
                x = nn.RMSNorm(epsilon=EPSILON, dtype=self.dtype, name=f"norm_{name}")(x)
            x = rearrange(x, "b n (h d) -> b n h d", h=self.config.heads)
            return x if table is None or name == "v" else rotate(x, table)

        q, k, v = heads("q", x), heads("k", y), heads("v", y)
        if self.grid:
            y = windowed_attention(q, k, v, self.grid, self.config.window, self.implementation)
        else:
            # The tokens of the clip are sharded over devices; the text is the same on all.
            sharding = {} if table is None else {"length": len(table[0]), "split_keys": True}
            y = attention(q, k, v, self.implementation, **sharding)
        y = checkpoint_name(rearrange(y, "b n h d -> b n (h d)"), "attention")
        return dense(self.config.width, self.dtype, "o")(y)


class DiTBlock(nn.Module):
    """Self-attention and feed-forward, both modulated by time, cross-attention to text between.

    Attributes:
        config, dtype: See `DiTAttention`.
        attention: Implementation of attention, see `gnvc_jax.refiner.attention.attention`.
        grid: (latents, rows, columns) of tokens.
    """

    config: DiTConfig
    dtype: DTypeLike
    attention: str | None
    grid: tuple[int, int, int]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        time: Float[Array, "b t 6 d"],
        text: Float[Array, "b m d"] | None,
        table: RotaryTable,
    ) -> Float[Array, "b n d"]:
        """Computes the next residual stream.

        Args:
            x: Residual stream, float32.
            time: Shift, scale and gate of attention, then of the feed-forward, of each latent or of
                all (t = 1).
            text: Embedded text, None for a model without text.
            table: Table of the rotary embedding.
        """
        cfg = self.config
        # As in Wan: each block learns an offset to the modulation that all blocks share.
        init = nn.initializers.normal(cfg.width**-0.5)
        time = time + self.param("modulation", init, (6, cfg.width), jnp.float32)
        # Adaptive layer norm (DiT, Peebles and Xie 2023): each is (b, n, d), or (b, 1, d) for all.
        shift1, scale1, gate1, shift2, scale2, gate2 = per_token(time, self.grid)

        # Norm and modulation in float32, the products inside attention in `dtype`.
        y = (layer_norm()(x) * (1 + scale1) + shift1).astype(self.dtype)
        # None lets every token attend to all others, as in Wan.
        grid = self.grid if cfg.window else None
        attend = DiTAttention(cfg, self.dtype, self.attention, grid, name="self_attention")
        y = attend(y, y, table)
        x = x + gate1 * y

        if text is not None:
            # Time does not modulate cross-attention; its norm has a scale and a shift of its own.
            y = layer_norm()(x) * self.param("cross_scale", nn.initializers.ones, (cfg.width,))
            y = y + self.param("cross_bias", nn.initializers.zeros, (cfg.width,))
            cross = DiTAttention(cfg, self.dtype, self.attention, name="cross_attention")
            x = x + cross(y.astype(self.dtype), text, None)

        y = layer_norm()(x) * (1 + scale2) + shift2  # `dense` casts it to its dtype
        y = checkpoint_name(dense(cfg.ffn_width, self.dtype, "ffn_in")(y), "ffn")
        # The tanh approximation of GELU, as in Wan.
        y = dense(cfg.width, self.dtype, "ffn_out")(nn.gelu(y, approximate=True))
        # Gates are float32, so the residual stream stays float32 although y is in `dtype`.
        return x + gate2 * y


class DiTGroup(nn.Module):
    """One context block, if the model has an adapter, and the blocks up to the next one.

    The body of a scan: VACE has one context block for every few blocks, and adds its hint right
    after the first of them.

    Attributes:
        config, dtype, attention, grid: See `DiTBlock`.
        remat: See `DiT`.
    """

    config: DiTConfig
    dtype: DTypeLike
    attention: str | None
    remat: str
    grid: tuple[int, int, int]

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Array | None],
        scale: Float[Array, ""],
        time: Float[Array, "b t 6 d"],
        text: Float[Array, "b m d"] | None,
        table: RotaryTable,
    ) -> tuple[tuple[Array, Array | None], None]:
        """Runs the blocks of one group.

        Args:
            carry: Residual stream and context, both (b, n, d); no context without an adapter.
            scale: Weight of the hint.
            time, text, table: See `DiTBlock`.

        Returns:
            The next carry, and None, since the scan stacks nothing.
        """
        (x, context), cfg, block = carry, self.config, DiTBlock
        # Pinned here, so that the partitioner keeps the carry of the scan sharded by tokens.
        x = constrain(x, batch=0, context=1)
        if self.remat != "none":
            # Inside a scan XLA cannot merge the two computations; no need to prevent it.
            block = nn.remat(DiTBlock, policy=REMAT[self.remat], prevent_cse=False)
        hint = 0.0
        if context is not None:
            context = block(cfg, self.dtype, self.attention, self.grid, name="context")(
                context, time, text, table
            )
            # Zero at the start, so that a new adapter changes nothing (ControlNet).
            hint = dense(cfg.width, self.dtype, "context_out", nn.initializers.zeros)(context)
        for i in range(cfg.group_size):
            one = block(cfg, self.dtype, self.attention, self.grid, name=f"block_{i}")
            x = one(x, time, text, table)
            # VACE injects the hint after the first block of a group, not before it.
            x = x + scale * hint if i == 0 else x
        return (x, context), None


class DiT(nn.Module):
    """The velocity field of Wan2.1: noise minus data, at Wan's timestep (1000 noise, 0 data).

    Attributes:
        config: Sizes of the network.
        dtype: Type of the factors of matrix products and of attention.
        attention: Implementation (see `gnvc_jax.refiner.attention`), by default the backend's best.
        remat: Key of REMAT that says which activations the backward pass keeps.
    """

    config: DiTConfig
    dtype: DTypeLike = jnp.float32
    attention: str | None = None
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        latents: Float[AnyArray, "b t h w c"],
        time: Float[AnyArray, " b"],
        text: Float[AnyArray, "_ m text_width"] | None = None,
        context: Float[AnyArray, "_ _ _ _ context_channels"] | None = None,
        context_scale: Float[AnyArray, "*blocks"] | float = 1.0,
        *,
        time_extra: Float[AnyArray, "b t width"] | float = 0.0,
        context_extra: Float[AnyArray, "b n width"] | float = 0.0,
    ) -> Float[Array, "b t h w c"]:
        """Computes the velocity, in float32.

        Args:
            latents: State of the flow; h and w are even.
            time: Wan's timestep in 0..1000.
            text: Embedded prompt of at most text_length rows; zero rows are added.
            context: Condition of a model with an adapter.
            context_scale: Weight of the hints, one or one per context block.
            time_extra: Added to the embedding of time, for each latent.
            context_extra: Added to the embedding of the context's tokens.

        Raises:
            UsageError: If the shape of an input does not fit the model.
        """
        cfg = self.config
        check_sizes(cfg, latents, text, context)
        _, t, h, w, _ = latents.shape
        n = cfg.tokens(t, h, w)
        # (b, t, h, w, c) -> (b, n, 4c) -> (b, n, d), the residual stream in float32.
        x = shard_tokens(patchify(latents))
        x = dense(cfg.width, self.dtype, "patch_embedding")(x).astype(jnp.float32)

        # (b,) -> (b, frequencies) -> (b, d) -> (b, t, d), or (b, 1, d) for all latents.
        # `time_extra` carries quality levels, see `Refiner`.
        time = sinusoid(jnp.asarray(time), cfg.frequencies)
        time = exact_dense(cfg.width, "time_in", SMALL)(time)
        time = exact_dense(cfg.width, "time_out", SMALL)(nn.silu(time))[:, None] + time_extra
        rows = exact_dense(6 * cfg.width, "time_modulation")(nn.silu(time))
        # Shift, scale and gate of attention and feed-forward, for all blocks.
        rows = constrain(rearrange(rows, "b t (six d) -> b t six d", six=6), batch=0)

        if text is not None:
            # (b, m, text_width) -> (b, text_length, text_width) -> (b, text_length, d).
            # Zero rows up to text_length, as Wan pads prompts; they are attended to.
            text = jnp.pad(text, ((0, 0), (0, cfg.text_length - text.shape[1]), (0, 0)))
            text = nn.gelu(dense(cfg.width, self.dtype, "text_in", SMALL)(text), approximate=True)
            text = constrain(dense(cfg.width, self.dtype, "text_out", SMALL)(text), batch=0)

        tokens = None
        if context is not None:
            tokens = dense(cfg.width, self.dtype, "context_embedding")(patchify(context))
            first = dense(cfg.width, self.dtype, "context_in", nn.initializers.zeros)
            # The context branch starts from the tokens of the latents, as in VACE.
            tokens = first(shard_tokens(tokens + context_extra)) + x

        grid = t, h // PATCH, w // PATCH
        # One compiled body for all groups, instead of an unrolled network of 30 blocks.
        groups = nn.scan(
            DiTGroup,
            variable_axes={"params": 0},  # parameters of all groups are stacked
            split_rngs={"params": True},
            # `scale` has an entry for each group; modulation, text and table are the same for all.
            # Declared as an int, although it may be a tree.
            in_axes=(0, *[nn.broadcast] * 3),  # pyright: ignore[reportArgumentType]
            length=cfg.groups,
        )(cfg, self.dtype, self.attention, self.remat, grid, name="groups")
        table = rotary_table(cfg.head_width, t, h, w)
        # (groups,), also where one weight is given for all.
        scale = jnp.broadcast_to(jnp.asarray(context_scale, jnp.float32), (cfg.groups,))
        (x, _), _ = groups((x, tokens), scale, rows, text, table)

        init = nn.initializers.normal(cfg.width**-0.5)
        modulation = self.param("head_modulation", init, (2, cfg.width), jnp.float32)
        # The head has no gate, hence two rows. It starts at zero: so does the velocity.
        shift, scale = per_token(modulation + time[:, :, None], grid)
        x = layer_norm()(x) * (1 + scale) + shift
        # (b, n, d) -> (b, n, 4c) -> (b, t, h, w, c).
        x = exact_dense(PATCH**2 * cfg.channels, "head", nn.initializers.zeros)(x)
        # Padding from `shard_tokens` is dropped.
        return unpatchify(x[:, :n], t, h, w)


def check_sizes(
    cfg: DiTConfig, latents: AnyArray, text: AnyArray | None, context: AnyArray | None
) -> None:
    """Checks the shapes of the inputs of a `DiT`.

    Raises:
        UsageError: If one does not fit the model; the message says which.
    """
    b, t, h, w, c = latents.shape
    if c != cfg.channels or h % PATCH or w % PATCH:
        raise UsageError(
            f"latents {latents.shape}: expected {cfg.channels} channels, even height and width"
        )
    # The prompt: as many clips, any number of rows up to text_length, and the text encoder's width.
    expected = (b, cfg.text_length, cfg.text_width) if cfg.text_length else None
    found = None if text is None else text.shape
    # The number of rows is free up to text_length; batch and width are not.
    fits = found == expected or (found and expected and found[::2] == expected[::2])
    if not fits or (found and expected and found[1] > expected[1]):
        raise UsageError(f"text {found}: expected {expected}, or fewer rows")
    # The condition lies on the grid of the latents; without an adapter there is none.
    expected = (b, t, h, w, cfg.context_channels) if cfg.context_every else None
    found = None if context is None else context.shape
    if found != expected:
        raise UsageError(f"context {found}: expected {expected}")
