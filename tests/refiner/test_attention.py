"""Every implementation of attention against plain NumPy in float64, with gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnvc_jax.errors import UsageError
from gnvc_jax.refiner import attention as module
from gnvc_jax.refiner.attention import (
    PLAIN_TILES,
    SPLASH_TILES,
    Tiles,
    attention,
    choose,
    chunked_attention,
    splash_attention,
    splash_tiles,
    windowed_attention,
)


def inputs(n, m, heads=2, d=128, b=2):
    keys = jax.random.split(jax.random.key(n), 4)
    return [jax.random.normal(k, (b, size, heads, d)) for k, size in zip(keys, (n, m, m, n))]


def reference(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), v)


def gradients(function, q, k, v, cotangent):
    return jax.grad(lambda *x: jnp.vdot(function(*x), cotangent), argnums=(0, 1, 2))(q, k, v)


@pytest.mark.parametrize(("n", "m"), [(64, 64), (37, 50), (1, 5)])
def test_chunked_attention_matches_plain_attention(n, m, monkeypatch):
    q, k, v, cotangent = inputs(n, m, d=16)
    monkeypatch.setattr(module, "SCORES_IN_MEMORY", 10 * m * 2 * 2)  # chunks of ten queries
    np.testing.assert_allclose(chunked_attention(q, k, v), reference(q, k, v), atol=1e-5)
    plain = functools.partial(attention, implementation="xla")
    for ours, theirs in zip(gradients(chunked_attention, q, k, v, cotangent),
                            gradients(plain, q, k, v, cotangent)):  # fmt: skip
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_chunked_attention_bounds_memory(monkeypatch):
    q, k, v, _ = inputs(512, 256, d=16)
    monkeypatch.setattr(module, "SCORES_IN_MEMORY", 1 << 14)

    def largest(function):
        compiled = jax.jit(function).lower(q, k, v).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert (
        largest(chunked_attention) < largest(functools.partial(attention, implementation="xla")) / 2
    )


@pytest.mark.parametrize(("n", "m"), [(256, 256), (200, 130)])
def test_tpu_kernel_matches_plain_attention_in_interpret_mode(n, m, monkeypatch):
    monkeypatch.setattr(module, "PLAIN_TILES", Tiles(256, 256, 128, 128))
    q, k, v, _ = inputs(n, m, b=1)
    ours = splash_attention(q, k, v, interpret=True)
    np.testing.assert_allclose(ours, reference(q, k, v), atol=2e-5)


@pytest.mark.slow
def test_gradients_of_tpu_kernel_match_plain_attention(monkeypatch):
    monkeypatch.setattr(module, "PLAIN_TILES", Tiles(256, 256, 128, 128))
    q, k, v, cotangent = inputs(140, 130, heads=1, b=1)
    ours = gradients(functools.partial(splash_attention, interpret=True), q, k, v, cotangent)
    theirs = gradients(functools.partial(attention, implementation="xla"), q, k, v, cotangent)
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, atol=5e-5)


# Tokens of Wan's DiT: 81 frames of 832x480 and of 1280x720, one window of small models; and a text.
@pytest.mark.parametrize("n", [32760, 75600, 1560, 512, 77, 1])
@pytest.mark.parametrize("m", [32760, 512, 130])
@pytest.mark.parametrize("largest", [*SPLASH_TILES.values(), PLAIN_TILES])
def test_tiles_are_whole_registers_within_the_limits_and_pad_little(n, m, largest):
    tiles = splash_tiles(n, m, largest)
    assert all(0 < size <= limit and size % 128 == 0 for size, limit in zip(tiles, largest))
    # What the kernel asks for.
    assert tiles.queries % tiles.back == 0 and tiles.keys % tiles.scored == 0
    # As few tiles as of the largest size, and less than a register more than needed in each part.
    count, parts = -(-n // tiles.queries), tiles.queries // tiles.back
    assert count == -(-n // largest.queries)
    assert count * tiles.queries - n < count * parts * 128
    count = -(-m // tiles.scored)
    assert count == -(-m // largest.scored) and count % (tiles.keys // tiles.scored) == 0


def test_kernel_is_chosen_by_backend_dtype_and_head_width():
    assert choose(jnp.bfloat16, 128, "gpu") == "cudnn"
    assert choose(jnp.float32, 128, "gpu") == choose(jnp.bfloat16, 256, "gpu") == "chunked"
    assert choose(jnp.bfloat16, 128, "tpu") == choose(jnp.float32, 256, "tpu") == "splash"
    assert choose(jnp.bfloat16, 64, "tpu") == choose(jnp.float32, 128, "cpu") == "chunked"
    with pytest.raises(ValueError, match="flash"):
        attention(*inputs(2, 2, d=8)[:3], "flash")


def neighbourhood(position: int, count: int, window: int) -> range:
    """Tokens along one axis that a token sees: those of the window around its block."""
    block = window // 2
    first = position // block * block - (window - block) // 2
    first = min(max(first, 0), max(0, count - window))
    return range(first, min(first + window, count))


@pytest.mark.parametrize(("rows", "columns"), [(6, 9), (3, 10), (4, 4)])
def test_windowed_attention_is_plain_attention_among_neighbours(rows, columns):
    t, window = 2, 4
    q, k, v, _ = inputs(t * rows * columns, t * rows * columns, d=8, b=1)
    got = windowed_attention(q, k, v, (t, rows, columns), window)
    tokens = np.arange(t * rows * columns).reshape(columns, t, rows)
    for x in range(columns):
        for y in range(rows):
            seen = tokens[neighbourhood(x, columns, window)][:, :, neighbourhood(y, rows, window)]
            keys = k[:, seen.ravel()], v[:, seen.ravel()]
            want = reference(q[:, tokens[x, :, y]], *keys)
            np.testing.assert_allclose(got[:, tokens[x, :, y]], want, atol=1e-5)


def test_windowed_attention_costs_as_much_per_token_in_large_frames():
    def operations(rows, columns):
        q = jax.ShapeDtypeStruct((1, rows * columns, 2, 8), jnp.float32)
        function = functools.partial(windowed_attention, grid=(1, rows, columns), window=8)
        return jax.jit(function).lower(q, q, q).compile().cost_analysis()["flops"]

    assert operations(32, 32) < 1.2 * 4 * operations(16, 16)


def test_windowed_attention_refuses_tokens_spread_over_devices(monkeypatch):
    monkeypatch.setattr(module, "axis_size", lambda axis: 2 if axis == "context" else 1)
    q, k, v, _ = inputs(64, 64, d=8)
    with pytest.raises(UsageError, match="context=1"):
        windowed_attention(q, k, v, (1, 8, 8), 4)
