"""Softmax attention without a mask, by the best kernel of each backend.

The DiT calls `attention`, or `windowed_attention` for large frames. Both pick one of
IMPLEMENTATIONS (`choose`) and leave what crosses devices to `gnvc_jax.parallel.attention`.

All functions take queries (b, n, heads, d), keys and values (b, m, heads, d) and return
(b, n, heads, d); scores are scaled by 1/sqrt(d) and softmax is in float32.
"""

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gnvc_jax.errors import UsageError
from gnvc_jax.parallel import attention as parallel
from gnvc_jax.parallel import axis_size, backend, device_kind

RING = "ring"  # of all devices along the mesh axis `context`

# At most this many scores (queries x keys x heads x batch) are in memory at once on CPU: 256 MiB in
# float32.
SCORES_IN_MEMORY = 1 << 26
LANES = 128  # of a vector register of TPUs: tiles of the splash kernel are multiples


class Tiles(NamedTuple):
    """Tokens that the splash kernel works on at a time.

    Attributes:
        queries, keys: Tokens that are fetched into the fast memory.
        scored: Keys, among these, that scores are computed for at once.
        back: Queries in the backward pass, which takes `scored` keys.
    """

    queries: int
    keys: int
    scored: int
    back: int


# The largest tiles by `device_kind`, for heads of width 128 in bfloat16. More queries per tile mean
# that keys are fetched less often. All of them compile with libtpu's default limit of fast memory.
SPLASH_TILES = {
    "TPU v5 lite": Tiles(2048, 1024, 512, 1024),
    "TPU v5": Tiles(2048, 1024, 512, 1024),
    "TPU v5p": Tiles(2048, 1024, 512, 1024),
    "TPU v6 lite": Tiles(3072, 2048, 1024, 1536),
    "TPU7x": Tiles(3072, 2048, 1024, 1024),
}
PLAIN_TILES = Tiles(512, 512, 512, 512)  # other chips


def attention(
    q: Float[Array, "b n heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    implementation: str | None = None,
    *,
    length: int | None = None,
    split_keys: bool = False,
) -> Float[Array, "b n heads d"]:
    """Attention by the named implementation, or by the one that `choose` names.

    On a mesh, each device works on its clips, tokens and heads.

    Args:
        q, k, v: Queries, keys and values.
        implementation: A key of IMPLEMENTATIONS, or "ring": keys travel from device to device, and
            each device uses the kernel of `choose`.
        length: Number of keys that are not padding; by default, all.
        split_keys: Whether keys are sharded over the mesh axis `context` as queries are. Tokens are
            then exchanged for heads, so that the implementation sees all tokens of some heads.
            "ring" does without, and is the default where padding the heads to a multiple of
            `context` would at least double their number.

    Raises:
        UsageError: If the name is unknown, or the mesh axis `tensor` does not divide the heads.
    """
    # Static decisions, taken while tracing: dtype and head width choose the kernel, heads and mesh
    # choose between exchange and ring.
    name, ring = resolve(implementation, q.dtype, *q.shape[2:])
    options = {"length": length or k.shape[1], "split_keys": split_keys, "ring": ring}
    return parallel.attention(IMPLEMENTATIONS[name], q, k, v, **options)


def windowed_attention(
    q: Float[Array, "b n heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    grid: tuple[int, int, int],
    window: int,
    implementation: str | None = None,
) -> Float[Array, "b n heads d"]:
    """Attention of each token to its spatial neighbourhood, in all latents.

    Tokens are taken in square blocks of half a window, and each block attends to the window around
    it. At the borders the window moves inwards instead of being cut, so all windows have the same
    size and nothing is masked; the cost grows with the area of the frame rather than with its
    square. Frames no larger than a window get plain attention.

    Args:
        q, k, v: Queries, keys and values, with n = m = columns * latents * rows, in this order.
        grid: (latents, rows, columns) of tokens.
        window: Tokens per side, even.
        implementation: See `attention`.

    Raises:
        UsageError: If a mesh shards tokens over its axis `context`.
    """
    t, rows, columns = grid
    if rows <= window and columns <= window:
        return attention(q, k, v, implementation)
    if axis_size("context") > 1:
        raise UsageError(
            "attention in windows needs a mesh with context=1: it does not shard tokens"
        )
    # A window of side w surrounds a block of side w / 2 by a margin of w / 4 on each side. Smaller
    # blocks would copy keys more often, larger ones would leave less margin.
    block = window // 2

    def starts(count: int) -> Int[np.ndarray, " blocks"]:
        """First token of the window of each block along one axis."""
        # One window per block; those at the borders are clipped so that they lie inside of the
        # frame.
        first = np.arange(0, count, block) - (window - block) // 2
        return np.clip(first, 0, max(0, count - window))

    across, down = starts(columns), starts(rows)
    # Back from the sequence to the grid: (b, columns, latents, rows, heads, d).
    q = rearrange(q, "b (w t h) n d -> b w t h n d", t=t, h=rows)
    # Only queries are filled up to whole blocks of columns and rows. Windows always lie inside of
    # the frame, so no key is padding.
    fill = ((0, -columns % block), (0, 0), (0, -rows % block))
    q = jnp.pad(q, ((0, 0), *fill, (0, 0), (0, 0)))
    # (blocks across, blocks down) become part of the batch: queries are now
    # (b * x * y, block * t * block, heads, d).
    q = rearrange(q, "b (x i) t (y j) n d -> (b x y) (i t j) n d", i=block, j=block)

    def windows(x: Array) -> Array:
        """The tokens around each block, as a batch: ((b x y), tokens of a window, heads, d)."""
        # Gathering with tables of indices, first (x, i) of columns, then (y, j) of rows. Windows
        # overlap by half, so a key is copied up to about four times.
        x = rearrange(x, "b (w t h) n d -> b w t h n d", t=t, h=rows)
        x = x[:, across[:, None] + np.arange(min(window, columns))]  # (b, x, i, t, h, n, d)
        x = x[:, :, :, :, down[:, None] + np.arange(min(window, rows))]  # (b, x, i, t, y, j, n, d)
        return rearrange(x, "b x i t y j n d -> (b x y) (i t j) n d")

    # Every (clip, block) is a batch entry: one call of an ordinary kernel, no mask.
    out = attention(q, windows(k), windows(v), implementation)
    sizes = {"x": len(across), "y": len(down), "i": block, "j": block}
    out = rearrange(out, "(b x y) (i t j) n d -> b (x i) t (y j) n d", t=t, **sizes)
    # What the filled-up queries attended to is dropped.
    return rearrange(out[:, :columns, :, :rows], "b w t h n d -> b (w t h) n d")


def resolve(
    implementation: str | None, dtype: DTypeLike, heads: int, head_width: int
) -> tuple[str, bool]:
    """Decides what `attention` does on the mesh in use.

    Args:
        implementation: See `attention`.
        dtype: Type of queries, keys and values.
        heads: Number of heads, over all devices.
        head_width: Width of a head.

    Returns:
        A key of IMPLEMENTATIONS, and whether keys travel from device to device.

    Raises:
        UsageError: If the name is unknown.
    """
    # The axis `tensor` divides the heads first, and the exchange divides what is left over
    # `context`.
    ring = implementation == RING or (
        implementation is None
        and exchanged_heads(heads // axis_size("tensor"), axis_size("context")) is None
    )
    name = choose(dtype, head_width) if implementation in (None, RING) else implementation
    if name not in IMPLEMENTATIONS:
        names = ", ".join((*IMPLEMENTATIONS, RING))
        raise UsageError(f"attention {name!r}: expected one of {names}")
    return name, ring


def exchanged_heads(heads: int, devices: int) -> int | None:
    """Number of heads, padded to a multiple of the devices, for the exchange of tokens for heads.

    Returns:
        The number, or None where padding would at least double it; keys then travel in a ring.
    """
    filled = heads + -heads % devices
    return filled if filled < 2 * heads else None


def choose(dtype: DTypeLike, head_width: int, platform: str | None = None) -> str:
    """Chooses the implementation for a platform, by default for the one that is traced for.

    cuDNN's flash attention needs half precision and a head width of at most 128, the TPU's splash
    kernel a multiple of 128. Elsewhere the scores are computed for a few queries at a time.
    """
    platform = platform or backend()
    half = jnp.dtype(dtype).itemsize == 2  # bfloat16 or float16
    if platform == "gpu" and half and head_width % 8 == 0 and head_width <= 128:
        return "cudnn"
    if platform == "tpu" and head_width % 128 == 0:
        return "splash"
    return "chunked"


def plain_attention(
    q: Float[Array, "b n heads d"], k: Float[Array, "b m heads d"], v: Float[Array, "b m heads d"]
) -> Float[Array, "b n heads d"]:
    """Attention by two products of matrices, with all scores in memory.

    The sum of the weights divides the result instead of each weight: scores outnumber it by far,
    and on CPUs that makes `jax.nn.dot_product_attention` take half as long again.
    """
    q, k, v = (rearrange(x, "b n h d -> b h n d") for x in (q, k, v))
    scores = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    # The largest score of a query cancels, so it needs no gradient; without it exp would overflow.
    scores = (scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True))) / q.shape[-1] ** 0.5
    weights = jnp.exp(scores)
    y = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    y = y / weights.sum(-1, keepdims=True)
    return rearrange(y, "b h n d -> b n h d").astype(v.dtype)


def chunked_attention(
    q: Float[Array, "b n heads d"], k: Float[Array, "b m heads d"], v: Float[Array, "b m heads d"]
) -> Float[Array, "b n heads d"]:
    """Plain attention over chunks of queries, so that the scores never exceed SCORES_IN_MEMORY.

    The backward pass computes the scores again, so its memory is bounded in the same way.
    """
    b, n, heads, _ = q.shape
    # Queries per chunk: each of them has b * heads * m scores.
    size = max(1, SCORES_IN_MEMORY // (b * heads * k.shape[1]))
    if size >= n:
        return plain_attention(q, k, v)
    chunks = -(-n // size)
    size = -(-n // chunks)  # of equal chunks, to pad as little as possible
    # (b, n, heads, d) -> (chunks, b, size, heads, d): a sequential map, one chunk in memory.
    q = jnp.pad(q, ((0, 0), (0, chunks * size - n), (0, 0), (0, 0)))
    q = rearrange(q, "b (c s) h d -> c b s h d", c=chunks)
    # Without `checkpoint` the map would keep the probabilities of all chunks for the backward pass.
    y = jax.lax.map(jax.checkpoint(lambda part: plain_attention(part, k, v)), q)
    return rearrange(y, "c b s h d -> b (c s) h d")[:, :n]


def splash_attention(
    q: Float[Array, "b n heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    interpret: bool = False,
) -> Float[Array, "b n heads d"]:
    """The Pallas flash kernel for TPUs.

    Args:
        q, k, v: Queries, keys and values.
        interpret: Run the kernel in JAX operations, on any backend.
    """
    # Imported here: only TPUs need the modules, and importing them takes a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    def padded(x: Float[Array, "b n heads d"], size: int) -> Float[Array, "b heads n2 d"]:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
        return rearrange(x, "b n h d -> b h n d")

    n, m, heads = q.shape[1], k.shape[1], q.shape[2]
    tiles = splash_tiles(n, m, SPLASH_TILES.get(device_kind(), PLAIN_TILES))
    # Unlike the other implementations, the kernel does not scale scores; the queries are scaled
    # instead. From here on all three are (b, heads, tokens, d).
    q = padded(q * q.shape[-1] ** -0.5, tiles.queries)
    k, v = padded(k, tiles.keys), padded(v, tiles.keys)
    # Every query sees every key by position; padding is dealt with by the segments below.
    mask = masks.MultiHeadMask([masks.FullMask((q.shape[2], k.shape[2]))] * heads)
    # "dkv" is the pass for the gradients of keys and values, "dq" that for those of queries.
    sizes = kernels.BlockSizes(
        block_q=tiles.queries,
        block_kv=tiles.keys,
        block_kv_compute=tiles.scored,
        block_q_dkv=tiles.back,
        block_kv_dkv=tiles.scored,
        block_kv_dkv_compute=tiles.scored,
        block_q_dq=tiles.back,
        block_kv_dq=tiles.scored,
    )
    # The kernel is made for one device and mapped over the batch below.
    kernel = kernels.make_splash_mha_single_device(
        mask,
        block_sizes=sizes,
        interpret=interpret,
        # What the backward pass needs of the forward pass is kept where outputs are.
        residual_checkpoint_name="attention",
    )
    # Tokens attend within their segment; padding is a segment of its own.
    segments = kernels.SegmentIds(
        q=jnp.zeros(q.shape[2], jnp.int32), kv=(jnp.arange(k.shape[2]) >= m).astype(jnp.int32)
    )
    # The clips of a batch share the segments, which are therefore not mapped.
    y = cast(Array, jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, segments))
    return rearrange(y, "b h n d -> b n h d")[:, :n]


def splash_tiles(n: int, m: int, largest: Tiles) -> Tiles:
    """Tiles for n queries and m keys: as few as `largest` allows, of equal size, to pad little.

    Args:
        n, m: Numbers of queries and keys; tokens are padded to whole tiles.
        largest: Upper limits, multiples of each other where tiles are divided.
    """

    def equal(count: int, limit: int, step: int) -> int:
        """The multiple of `step` that divides `count` tokens into as few parts as `limit` does."""
        return -(-count // (-(-count // limit) * step)) * step

    # A tile of queries consists of whole tiles of the backward pass, except for short sequences,
    # such as a text, which get one tile of their own size.
    parts = largest.queries // largest.back if n > largest.back else 1
    queries = equal(n, largest.queries, LANES * parts)
    scored = equal(m, largest.scored, LANES)
    # Keys are fetched for several computations at once, where that divides their number.
    count = -(-m // scored)
    most = largest.keys // scored
    together = next(x for x in range(most, 0, -1) if count % x == 0)
    return Tiles(queries, together * scored, scored, queries // parts)


IMPLEMENTATIONS = {
    "xla": functools.partial(jax.nn.dot_product_attention, implementation="xla"),
    "cudnn": functools.partial(jax.nn.dot_product_attention, implementation="cudnn"),
    "chunked": chunked_attention,
    "splash": splash_attention,
}
