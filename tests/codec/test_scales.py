"""The integer scale network: the same indices from every arithmetic, and from the training form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnvc_jax.codec import scales
from gnvc_jax.codec.config import CodecConfig

CONFIG = CodecConfig(y_channels=12, z_channels=5, scale_width=16)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def params():
    """Trained-looking parameters: every layer's output spreads over its range."""
    shapes = jax.eval_shape(
        scales.ScaleNetwork(CONFIG).init, jax.random.key(0), jnp.zeros((1,), jnp.int32), *zeros()
    )["params"]

    starts = {layer.name: layer.start for layer in scales.scale_layers(CONFIG)}

    def draw(path, leaf):
        name = path[-1].key
        if name.endswith("bias"):
            return starts[name[:2]] * RNG.uniform(0.5, 1.5, leaf.shape)
        return RNG.normal(0, 0.3 if name.endswith("kernel") else 0.2, leaf.shape)

    return jax.tree_util.tree_map_with_path(
        lambda p, x: jnp.asarray(draw(p, x), jnp.float32), shapes
    )


def zeros(h=1, w=1):
    y = jnp.zeros((1, 4 * h, 4 * w, CONFIG.y_channels))
    return jnp.zeros((1, h, w, CONFIG.z_channels)), y, y


def integers(h, w):
    shape = (4 * h, 4 * w, CONFIG.y_channels)
    z = RNG.integers(-15, 16, (h, w, CONFIG.z_channels))
    return z, RNG.integers(-127, 128, shape), RNG.integers(0, 64, shape)


def test_every_arithmetic_gives_the_same_indices(params):
    tables = scales.export(CONFIG, params)
    plain = {
        dtype: functools.partial(scales.scale_index, CONFIG, tables, dtype=dtype)
        for dtype in (jnp.float32, jnp.bfloat16, jnp.int32)
    }
    jitted = {dtype: jax.jit(network) for dtype, network in plain.items()}  # once for all levels
    trained = jax.jit(scales.ScaleNetwork(CONFIG).apply)
    for q_index in (0, 31, 63):
        given = integers(3, 5)
        exact = scales.scale_index_numpy(CONFIG, tables, q_index, *given)
        assert exact.dtype == np.uint8 and exact.max() <= 63
        assert len(np.unique(exact)) > 20  # the comparison is about something
        given32 = [np.asarray(v, np.int32) for v in given]
        for dtype in plain:
            np.testing.assert_array_equal(jitted[dtype](q_index, *given32), exact)
            np.testing.assert_array_equal(plain[dtype](q_index, *given32), exact)
        batch = [jnp.asarray(v, jnp.float32)[None] for v in given]
        (index,) = trained({"params": params}, jnp.asarray([q_index]), *batch)
        np.testing.assert_array_equal(index, exact)


def test_sharded_over_eight_devices_gives_the_same_indices(params):
    tables = scales.export(CONFIG, params)
    given = [np.asarray(v, np.int32) for v in integers(8, 2)]
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.P("rows"))
    placed = [jax.device_put(v, rows) for v in given]
    out = jax.jit(lambda *v: scales.scale_index(CONFIG, tables, 20, *v))(*placed)
    assert len(out.sharding.device_set) == 8
    np.testing.assert_array_equal(out, scales.scale_index_numpy(CONFIG, tables, 20, *given))


def test_worst_case_sums_stay_exact():
    """All inputs 255, all weights +-127, 512 inputs: the largest sum is below 2**24."""
    assert 255 * 127 * 512 < 2**24
    with pytest.raises(ValueError, match="at most 512 inputs"):
        CodecConfig(y_channels=256, scale_width=128)
    x, w = jnp.full((4, 512), 255.0), jnp.full((512, 8), 127.0)
    for dtype in (jnp.float32, jnp.bfloat16):
        acc = jnp.dot(x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32)
        assert np.all(np.asarray(acc, np.int64) == 255 * 127 * 512)


def test_requantise_is_rounded_division():
    acc, bias = RNG.integers(-(2**23), 2**23, 10_000), RNG.integers(-(2**22), 2**22, 10_000)
    mult = RNG.integers(64, 128, 10_000)
    got = scales.requantise(*(jnp.asarray(v, jnp.int32) for v in (acc, bias, mult)), 15, 255)
    exact = np.clip(np.floor((acc + bias) * mult / 2.0**15 + 0.5), 0, 255)
    np.testing.assert_array_equal(got, exact)


def test_gradients_reach_every_parameter(params):
    given = [jnp.asarray(v, jnp.float32)[None] for v in integers(2, 2)]

    def total(p):
        index = scales.ScaleNetwork(CONFIG).apply({"params": p}, jnp.asarray([9]), *given)
        return jnp.mean(scales.sigma_from_index(index))

    for name, grad in jax.jit(jax.grad(total))(params).items():
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0, name
