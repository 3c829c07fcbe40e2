"""Attention whose tokens are sharded over the mesh axis `context`, in two ways.

All-to-all (Ulysses, Jacobs et al. 2023, arXiv 2309.14509): each device swaps its part of the tokens
for all tokens of some heads, so that any kernel can work on them; if the number of devices does not
divide the heads, heads of zeros pad them. Ring (Liu et al. 2023, arXiv 2310.01889): keys and values
travel from device to device and the softmax is accumulated as they pass; there may be more devices
than heads, and none ever holds all keys.

`attention` is called by `gnvc_jax.refiner.attention`, which picks the kernel; it is a `shard_map`
around it. `ring_attention` runs inside and has a gradient of its own.

Queries (b, n, heads, d), keys and values (b, m, heads, d); scores are scaled by 1/sqrt(d).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from gnvc_jax.errors import UsageError
from gnvc_jax.parallel.rules import activation_spec

AXIS = "context"
# Finite, so that a block of nothing but padding does not give inf - inf. Its weight vanishes once a
# block with valid keys is added, whose maximum is far larger.
MASKED = -1e30


def attention(
    local: Callable[[Array, Array, Array], Array],
    q: Float[Array, "b n heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    *,
    length: int,
    split_keys: bool,
    ring: bool = False,
) -> Float[Array, "b n heads d"]:
    """Computes attention on the mesh in use.

    Args:
        local: Attention of what one device holds, by any kernel.
        q: Queries; n is a multiple of the axis `context`.
        k, v: Keys and values; with split_keys, m is such a multiple, too.
        length: Number of keys that are not padding.
        split_keys: Whether keys and values are sharded over `context` as queries are.
        ring: Whether split keys travel in a ring instead of being exchanged for heads.

    Raises:
        UsageError: If the mesh does not divide tokens or heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Padding fills the sequence up to a multiple of the mesh; without a mesh it is simply cut off.
    if mesh.empty or mesh.size == 1:
        return local(q, k[:, :length], v[:, :length])
    size, heads = mesh.shape[AXIS], q.shape[2]
    split_keys = split_keys and size > 1
    if heads % mesh.shape["tensor"]:
        raise UsageError(f"mesh axis tensor={mesh.shape['tensor']} does not divide {heads} heads")
    heads //= mesh.shape["tensor"]  # of one device
    extra = -heads % size  # heads of zeros, which the exchange needs
    if q.shape[1] % size:
        raise UsageError(f"mesh axis context={size} does not divide {q.shape[1]} tokens")

    # Each of the three functions sees what one device holds: (b, n / size, heads, d).
    def whole(q: Array, k: Array, v: Array) -> Array:
        """All keys are here."""
        return local(q, k[:, :length], v[:, :length])

    def exchanged(q: Array, k: Array, v: Array) -> Array:
        """All-to-all: (tokens / size, heads) -> (tokens, heads / size) and back."""
        # Heads are cut into `size` parts and sent, tokens are received and joined; padding of the
        # heads comes last, so it is cut off after the way back.
        swap = functools.partial(lax.all_to_all, axis_name=AXIS, tiled=True)
        fill = functools.partial(jnp.pad, pad_width=((0, 0), (0, 0), (0, extra), (0, 0)))
        y = whole(*(swap(fill(x), split_axis=2, concat_axis=1) for x in (q, k, v)))
        return swap(y, split_axis=1, concat_axis=2)[:, :, :heads]

    def rotated(q: Array, k: Array, v: Array) -> Array:
        """Keys travel in a ring."""
        return ring_attention(q, k, v, size, length)

    # Clips over data and fsdp, tokens over context, heads over tensor. Keys that are not split,
    # such as those of a text, lie whole on all devices along context.
    queries = activation_spec(mesh, q.shape, batch=0, context=1, tensor=2)
    keys = queries if split_keys else activation_spec(mesh, k.shape, batch=0, tensor=2)
    body = (rotated if ring else exchanged) if split_keys else whole
    # Kernels do not declare over which axes their results vary.
    return jax.shard_map(body, in_specs=(queries, keys, keys), out_specs=queries, check_vma=False)(
        q, k, v
    )


def pass_on(tree: Any, size: int) -> Any:
    """Passes a tree of arrays to the next device of the ring and receives the previous one's."""
    return lax.ppermute(tree, AXIS, [(i, (i + 1) % size) for i in range(size)])


def scores(
    q: Float[Array, "b n heads d"],
    k: Float[Array, "b m heads d"],
    step: Array | int,
    size: int,
    length: int,
) -> Float[Array, "b heads n m"]:
    """Scores, in float32, of the keys that have arrived after `step` steps; padding is masked."""
    # (b, heads, n, m). Sums of bfloat16 products are kept in float32, as is the softmax.
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    s *= q.shape[-1] ** -0.5
    owner = (lax.axis_index(AXIS) - step) % size  # the device that these keys came from
    # Device i holds tokens i m to (i + 1) m - 1 of the sequence, whose end is padding.
    valid = owner * k.shape[1] + jnp.arange(k.shape[1]) < length
    return jnp.where(valid, s, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def ring_attention(
    q: Float[Array, "b n heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    size: int,
    length: int,
) -> Float[Array, "b n heads d"]:
    """Computes attention of this device's queries to the keys of all `size` devices.

    It runs inside `shard_map`, on what one device holds.
    Softmax is accumulated in float32. The backward pass sends keys and values around once more,
    together with their gradients, so its memory is that of one block of scores.
    """
    return ring_forward(q, k, v, size, length)[0]


def ring_forward(
    q: Array, k: Array, v: Array, size: int, length: int
) -> tuple[Array, tuple[Array, ...]]:
    """Computes the result of `ring_attention`, and what `ring_backward` needs.

    The sum runs over blocks of keys with a running maximum (online softmax, Milakov and Gimelshein
    2018, arXiv 1805.02867), so the result is exact.
    """
    b, n, heads, d = q.shape

    def add(done: tuple[Array, ...], k: Array, v: Array, step: Array | int) -> tuple[Array, ...]:
        """Adds a block of keys to the numerator, the largest score and the denominator."""
        y, largest, total = done
        s = scores(q, k, step, size, length)
        # What was summed relative to the old maximum is rescaled to the new one by `keep`.
        new = jnp.maximum(largest, s.max(-1))
        p, keep = jnp.exp(s - new[..., None]), jnp.exp(largest - new)
        # Probabilities are rounded to the type of v, for a fast product; the sum over blocks is in
        # that of y, float32.
        part = jnp.einsum("bhqk,bkhd->bhqd", p.astype(v.dtype), v, preferred_element_type=y.dtype)
        return y * keep[..., None] + part, new, total * keep + p.sum(-1)

    def one_step(carry: tuple, step: Array) -> tuple[tuple, None]:
        done, kv = carry
        keys, values = pass_on(kv, size)
        return (add(done, keys, values, step), (keys, values)), None

    # Own keys first, then those of the size - 1 other devices as they arrive.
    zeros = jnp.zeros((b, heads, n), jnp.float32)
    done = add((jnp.zeros((b, heads, n, d), jnp.float32), zeros + MASKED, zeros), k, v, 0)
    (done, _), _ = lax.scan(one_step, (done, (k, v)), jnp.arange(1, size))
    y, largest, total = done
    # (b, heads, n, d) -> (b, n, heads, d).
    y = checkpoint_name(jnp.moveaxis(y / total[..., None], 1, 2).astype(q.dtype), "attention")
    # The logarithm of the softmax's denominator, (b, heads, n): all that the backward pass needs to
    # compute the probabilities again. It is named as y is, so that both survive rematerialisation.
    return y, (q, k, v, y, checkpoint_name(largest + jnp.log(total), "attention"))


def ring_backward(
    size: int, length: int, saved: tuple[Array, ...], dy: Array
) -> tuple[Array, Array, Array]:
    """Gradients of queries, keys and values, from the saved log-sum-exp of the scores.

    As in FlashAttention (Dao et al. 2022, arXiv 2205.14135): with P the probabilities and
    delta = rowsum(dY * Y), dS = P * (dY V^T - delta).
    """
    q, k, v, y, log_total = saved
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # (b, heads, n), the same for all blocks of keys.
    delta = product("bqhd,bqhd->bhq", dy, y)

    def add(
        dq: Array, dkv: tuple[Array, Array], k: Array, v: Array, step: Array | int
    ) -> tuple[Array, tuple[Array, Array]]:
        """Adds the gradients that a block of keys takes part in."""
        # Probabilities of the whole softmax, not of this block alone.
        p = jnp.exp(scores(q, k, step, size, length) - log_total[..., None])
        ds = p * (product("bqhd,bkhd->bhqk", dy, v) - delta[..., None]) * q.shape[-1] ** -0.5
        p, ds = p.astype(q.dtype), ds.astype(q.dtype)
        dk, dv = product("bhqk,bqhd->bkhd", ds, q), product("bhqk,bqhd->bkhd", p, dy)
        return dq + product("bhqk,bkhd->bqhd", ds, k), (dkv[0] + dk, dkv[1] + dv)

    def one_step(carry: tuple, step: Array) -> tuple[tuple, None]:
        dq, dkv, kv = carry
        dkv, (keys, values) = pass_on((dkv, kv), size)
        return (*add(dq, dkv, keys, values, step), (keys, values)), None

    # Gradients of q stay here; those of k and v are summed on the way, in float32.
    zeros = jnp.zeros(k.shape, jnp.float32)
    dq, dkv = add(jnp.zeros(q.shape, jnp.float32), (zeros, zeros), k, v, 0)
    (dq, dkv, _), _ = lax.scan(one_step, (dq, dkv, (k, v)), jnp.arange(1, size))
    # Gradients travel with their keys: one more step brings them to the device of these keys.
    dk, dv = pass_on(dkv, size)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


ring_attention.defvjp(ring_forward, ring_backward)
