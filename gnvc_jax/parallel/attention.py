"""Attention whose tokens are spread over the mesh axis `context`, in two ways.

All-to-all (Ulysses, Jacobs et al. 2023, arXiv 2309.14509): each device swaps its part of the tokens
for all tokens of some heads, so that any kernel can work on them; where the devices do not divide
the heads, heads of zeros fill them up. Ring (Liu et al. 2023, arXiv 2310.01889): keys and values
travel from device to device and the softmax is put together as they pass; there may be more devices
than heads, and none ever holds all keys.

Queries (b, n, heads, d), keys and values (b, m, heads, d); scores are scaled by 1/sqrt(d).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gnvc_jax.errors import UsageError
from gnvc_jax.parallel.rules import activation_spec

Array = jax.Array

AXIS = "context"
# Finite, so that a block of nothing but padding does not make inf - inf; the blocks with true keys
# take its weight away again.
MASKED = -1e30


def attention(
    local: Callable[[Array, Array, Array], Array],
    q: Array,
    k: Array,
    v: Array,
    *,
    length: int,
    split_keys: bool,
    ring: bool = False,
) -> Array:
    """Attention on the mesh in use; n (and m, where keys are split) divide by the axis `context`.

    local: attention of the part that a device has, whatever kernel it uses; length: keys after so
    many are padding; split_keys: whether keys and values are spread over `context` as queries are;
    ring: these go round instead of being exchanged for heads.

    Raises UsageError if the mesh does not divide the heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(q, k[:, :length], v[:, :length])
    size, heads = mesh.shape[AXIS], q.shape[2]
    split_keys = split_keys and size > 1
    if heads % mesh.shape["tensor"]:
        raise UsageError(f"mesh axis tensor={mesh.shape['tensor']} does not divide {heads} heads")
    heads //= mesh.shape["tensor"]
    extra = -heads % size
    if q.shape[1] % size:
        raise UsageError(f"mesh axis context={size} does not divide {q.shape[1]} tokens")

    def whole(q, k, v):
        return local(q, k[:, :length], v[:, :length])

    def exchanged(q, k, v):
        swap = functools.partial(lax.all_to_all, axis_name=AXIS, tiled=True)
        fill = functools.partial(jnp.pad, pad_width=((0, 0), (0, 0), (0, extra), (0, 0)))
        y = whole(*(swap(fill(x), split_axis=2, concat_axis=1) for x in (q, k, v)))
        return swap(y, split_axis=1, concat_axis=2)[:, :, :heads]

    def rotated(q, k, v):
        return ring_attention(q, k, v, size, length)

    queries = activation_spec(mesh, q.shape, batch=0, context=1, tensor=2)
    keys = queries if split_keys else activation_spec(mesh, k.shape, batch=0, tensor=2)
    body = (rotated if ring else exchanged) if split_keys else whole
    # Kernels do not declare over which axes their results vary.
    return jax.shard_map(body, in_specs=(queries, keys, keys), out_specs=queries, check_vma=False)(
        q, k, v
    )


def shift(tree: Array | tuple[Array, ...], size: int) -> Array | tuple[Array, ...]:
    """What the device before this one has."""
    return lax.ppermute(tree, AXIS, [(i, (i + 1) % size) for i in range(size)])


def scores(q: Array, k: Array, turn: Array | int, size: int, length: int) -> Array:
    """Float32 (b, heads, n, m) of the keys that arrive in a turn; padded keys are masked."""
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    s *= q.shape[-1] ** -0.5
    owner = (lax.axis_index(AXIS) - turn) % size
    valid = owner * k.shape[1] + jnp.arange(k.shape[1]) < length
    return jnp.where(valid, s, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def ring_attention(q: Array, k: Array, v: Array, size: int, length: int) -> Array:
    """Inside `shard_map`: attention of this device's queries to the keys of all `size` devices.

    Softmax is accumulated in float32. The backward pass sends keys and values round once more, with
    their gradients, so that memory stays that of one block of scores.
    """
    return ring_forward(q, k, v, size, length)[0]


def ring_forward(q: Array, k: Array, v: Array, size: int, length: int):
    b, n, heads, d = q.shape

    def add(done, k, v, turn):
        y, largest, total = done
        s = scores(q, k, turn, size, length)
        new = jnp.maximum(largest, s.max(-1))
        p, keep = jnp.exp(s - new[..., None]), jnp.exp(largest - new)
        part = jnp.einsum("bhqk,bkhd->bhqd", p.astype(v.dtype), v, preferred_element_type=y.dtype)
        return y * keep[..., None] + part, new, total * keep + p.sum(-1)

    def step(carry, turn):
        done, kv = carry
        kv = shift(kv, size)
        return (add(done, *kv, turn), kv), None

    zeros = jnp.zeros((b, heads, n), jnp.float32)
    done = add((jnp.zeros((b, heads, n, d), jnp.float32), zeros + MASKED, zeros), k, v, 0)
    (done, _), _ = lax.scan(step, (done, (k, v)), jnp.arange(1, size))
    y, largest, total = done
    y = checkpoint_name(jnp.moveaxis(y / total[..., None], 1, 2).astype(q.dtype), "attention")
    return y, (q, k, v, y, checkpoint_name(largest + jnp.log(total), "attention"))


def ring_backward(size: int, length: int, saved: tuple[Array, ...], dy: Array):
    q, k, v, y, log_total = saved
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    delta = product("bqhd,bqhd->bhq", dy, y)

    def add(dq, dkv, k, v, turn):
        p = jnp.exp(scores(q, k, turn, size, length) - log_total[..., None])
        ds = p * (product("bqhd,bkhd->bhqk", dy, v) - delta[..., None]) * q.shape[-1] ** -0.5
        p, ds = p.astype(q.dtype), ds.astype(q.dtype)
        dk, dv = product("bhqk,bqhd->bkhd", ds, q), product("bhqk,bqhd->bkhd", p, dy)
        return dq + product("bhqk,bkhd->bqhd", ds, k), (dkv[0] + dk, dkv[1] + dv)

    def step(carry, turn):
        dq, dkv, kv = carry
        dkv, kv = shift((dkv, kv), size)
        return (*add(dq, dkv, *kv, turn), kv), None

    zeros = jnp.zeros(k.shape, jnp.float32)
    dq, dkv = add(jnp.zeros(q.shape, jnp.float32), (zeros, zeros), k, v, 0)
    (dq, dkv, _), _ = lax.scan(step, (dq, dkv, (k, v)), jnp.arange(1, size))
    dk, dv = shift(dkv, size)  # home
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


ring_attention.defvjp(ring_forward, ring_backward)
