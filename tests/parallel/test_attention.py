"""Attention across devices against attention on one, with gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnvc_jax.parallel import MeshConfig, make_mesh
from gnvc_jax.refiner import DiT, DiTConfig
from gnvc_jax.refiner.attention import attention

MESH = MeshConfig(data=1, fsdp=2, context=4)
DIT = DiTConfig(24, 32, 4, 1, 8, 4, text_width=12, text_length=5)


def inputs(n, m, heads, b=2, d=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (b, n, heads, d), (b, m, heads, d), (b, m, heads, d), (b, n, heads, d)
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def with_gradients(attend, q, k, v, cotangent):
    """Output and gradients, compiled for the mesh in use."""

    @jax.jit
    def run(q, k, v):
        y, pull = jax.vjp(attend, q, k, v)
        return y, *pull(cotangent)

    return run(q, k, v)


def compare(found, expected, tolerance=2e-5):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("name", "heads", "mesh", "length"),
    [
        (None, 4, MESH, 16),
        ("xla", 8, dataclasses.replace(MESH, fsdp=1, tensor=2), 14),
        ("ring", 4, MESH, 16),
        ("ring", 3, MESH, 13),
        ("ring", 2, dataclasses.replace(MESH, fsdp=1, tensor=2), 9),  # a device with padding only
        (None, 3, MESH, 15),  # a head of zeros
        (None, 2, MESH, 15),  # twice as many heads; the default goes round
    ],
)
def test_attention_of_sharded_tokens_matches_one_device(name, heads, mesh, length):
    *qkv, cotangent = inputs(16, 16, heads)
    plain = functools.partial(attention, implementation="xla", length=length)
    expected = with_gradients(plain, *qkv, cotangent)
    attend = functools.partial(attention, implementation=name, length=length, split_keys=True)
    with jax.set_mesh(make_mesh(mesh)):
        compare(with_gradients(attend, *qkv, cotangent), expected)


def test_text_is_the_same_on_all_devices():
    *qkv, cotangent = inputs(16, 5, 4)
    expected = with_gradients(functools.partial(attention, implementation="xla"), *qkv, cotangent)
    with jax.set_mesh(make_mesh(MESH)):
        compare(with_gradients(attention, *qkv, cotangent), expected)


def test_one_clip_on_many_devices():
    *qkv, cotangent = inputs(16, 16, 4, b=1)
    expected = with_gradients(functools.partial(attention, implementation="xla"), *qkv, cotangent)
    attend = functools.partial(attention, split_keys=True)
    with jax.set_mesh(make_mesh(MESH)):
        compare(with_gradients(attend, *qkv, cotangent), expected)


def test_ring_accumulates_in_float32():
    """In half precision the error is that of the inputs, however many blocks are put together."""
    *qkv, cotangent = inputs(64, 64, 1, d=32, dtype=jnp.bfloat16)
    exact = with_gradients(
        functools.partial(attention, implementation="xla"),
        *(x.astype(jnp.float32) for x in qkv),
        cotangent.astype(jnp.float32),
    )
    attend = functools.partial(attention, implementation="ring", split_keys=True)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=8))):
        compare(with_gradients(attend, *qkv, cotangent), exact, 2e-2)


def test_sizes_that_the_mesh_does_not_divide_are_refused():
    q, k, v, _ = inputs(16, 16, 3)
    with jax.set_mesh(make_mesh(MESH)):
        with pytest.raises(ValueError, match="context=4 does not divide 15 tokens"):
            attention(q[:, :15], k, v, "ring", split_keys=True)
    with (
        jax.set_mesh(make_mesh(MeshConfig(data=1, tensor=2))),
        pytest.raises(ValueError, match="tensor=2 does not divide 3 heads"),
    ):
        attention(q, k, v)


def test_dit_pads_its_tokens():
    """15 tokens on two devices, beside split heads and parameters: result and gradients."""
    latents = jax.random.normal(jax.random.key(0), (2, 1, 6, 10, 4))
    text = jax.random.normal(jax.random.key(1), (2, 5, 12))
    args = latents, jnp.array([100.0, 700.0]), text
    shapes = jax.eval_shape(DiT(DIT).init, jax.random.key(0), *args)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.2, x.shape)), shapes)

    def run(params):
        def loss(params):
            velocity = DiT(DIT, remat="attention").apply({"params": params}, *args)
            return jnp.sum(velocity**3), velocity

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    expected = run(params)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))):
        found = run(params)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))
    close = functools.partial(np.testing.assert_allclose, atol=2e-6 * largest)
    jax.tree.map(close, found, expected)
