"""The DiT: size, cost, structure. Its values are tested in tests/porting and tests/parity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnvc_jax.refiner import VACE_1_3B, VACE_14B, WAN_1_3B, WAN_14B, DiT, DiTConfig, dit

SMALL = DiTConfig(
    width=48,
    ffn_width=64,
    heads=2,
    layers=4,
    frequencies=16,
    channels=4,
    text_width=12,
    text_length=8,
    context_every=2,
    context_channels=6,
)
PLAIN = dataclasses.replace(SMALL, context_every=0)


def arguments(cfg, b=2, t=2, h=4, w=6):
    keys = jax.random.split(jax.random.key(0), 3)
    latents = jax.random.normal(keys[0], (b, t, h, w, cfg.channels))
    text = jax.random.normal(keys[1], (b, 5, cfg.text_width))
    context = jax.random.normal(keys[2], (b, t, h, w, cfg.context_channels))
    time = jnp.linspace(100.0, 900.0, b)
    return (latents, time, text) + ((context,) if cfg.context_every else ())


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, *inputs):
    return model.apply({"params": params}, *inputs)


def abstract(cfg):
    return jax.eval_shape(DiT(cfg).init, jax.random.key(0), *arguments(cfg))["params"]


@pytest.fixture(scope="module")
def params():
    """Parameters of SMALL in which everything matters, zero-initialised layers included."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        gain = path[-1].key in ("scale", "cross_scale")
        return rng.normal(gain, 0.2, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract(SMALL))


@pytest.mark.parametrize(
    ("cfg", "count"),
    [(WAN_1_3B, 1_418_996_800), (WAN_14B, 14_288_491_584), (VACE_1_3B, 2_153_972_032)],
)
def test_presets_have_the_published_parameter_counts(cfg, count):
    assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract(cfg))) == count


def test_flops_match_published_figures():
    grids = (1, 32, 32), (5, 32, 32), (21, 60, 104)
    tera = [[cfg.flops(*g) / 1e12 for g in grids] for cfg in (WAN_1_3B, VACE_1_3B)]
    np.testing.assert_allclose(tera, [[0.83, 3.78, 283], [1.26, 5.76, 427]], rtol=0.003)
    assert WAN_1_3B.tokens(21, 60, 104) == 32760


def test_flops_match_the_compiler():
    """One layer, since XLA counts a scanned body once; it also counts what is no matrix product."""
    cfg = dataclasses.replace(PLAIN, layers=1, width=96, ffn_width=256, heads=2)
    inputs = arguments(cfg, b=1, t=3, h=16, w=16)
    model = DiT(cfg, attention="xla")
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    compiled = jax.jit(model.apply).lower(shapes, *inputs).compile()
    counted = compiled.cost_analysis()["flops"]
    assert 0.9 < cfg.flops(3, 16, 16) / counted < 1.0


def test_presets_have_the_published_groups_and_head_widths():
    assert VACE_14B.groups == 8 and VACE_1_3B.groups == 15
    assert WAN_14B.head_width == WAN_1_3B.head_width == 128


def test_new_adapter_leaves_the_output_unchanged(start):
    inputs = arguments(SMALL)
    new = "context_in", "context_out"
    variables = start(lambda key: DiT(SMALL).init(key, *inputs)["params"], *new)
    variables["head"]["kernel"] = jax.random.normal(
        jax.random.key(2), variables["head"]["kernel"].shape
    )
    with_adapter = apply(DiT(SMALL), variables, *inputs)
    groups = variables["groups"]
    blocks = jax.tree.map(
        lambda a, b: jnp.stack([a, b], 1).reshape(-1, *a.shape[1:]),
        *(groups[f"block_{i}"] for i in range(2)),
    )
    kept = {k: v for k, v in variables.items() if not k.startswith(("context", "groups"))}
    plain = kept | {"groups": {"block_0": blocks}}
    without = apply(DiT(PLAIN), plain, *inputs[:3])
    assert float(jnp.abs(without).max()) > 1
    np.testing.assert_allclose(with_adapter, without, atol=1e-5)


def test_adapter_and_context_scale_change_the_output(params):
    inputs = arguments(SMALL)
    outputs = [
        apply(DiT(SMALL), params, *inputs, scale)
        for scale in (0.0, 1.0, jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0]))
    ]
    np.testing.assert_allclose(outputs[1], outputs[3], atol=1e-6)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert float(jnp.abs(outputs[i] - outputs[j]).max()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "attention", "matmuls"])
def test_rematerialisation_changes_no_gradient(params, remat):
    inputs = arguments(SMALL)

    def gradient(remat):
        model = DiT(SMALL, remat=remat)
        return jax.jit(jax.grad(lambda p: (model.apply({"params": p}, *inputs) ** 2).mean()))(
            params
        )

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient(remat), gradient("none")
    )


@pytest.mark.slow
def test_rematerialisation_saves_memory(params):
    inputs = arguments(SMALL, t=4, h=16, w=16)

    def temporary(remat):
        model = DiT(SMALL, remat=remat)
        grad = jax.jit(jax.grad(lambda p: model.apply({"params": p}, *inputs).mean()))
        return grad.lower(params).compile().memory_analysis().temp_size_in_bytes

    sizes = [temporary(remat) for remat in ("full", "matmuls", "none")]
    assert sizes[0] < sizes[1] < sizes[2]


def test_half_precision_keeps_the_float32_parts(params):
    inputs = arguments(SMALL)

    # The time path decides every modulation: it must not be rounded.
    @functools.partial(jax.jit, static_argnums=0)
    def output_and_modulation(dtype):
        output, state = DiT(SMALL, dtype=dtype).apply(
            {"params": params}, *inputs, capture_intermediates=True
        )
        return output, state["intermediates"]["time_modulation"]["__call__"][0]

    exact, modulation = output_and_modulation(jnp.float32)
    rounded, same = output_and_modulation(jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    error = jnp.abs(rounded - exact).max() / jnp.abs(exact).max()
    assert 1e-4 < error < 3e-2
    np.testing.assert_array_equal(same, modulation)


def test_unpatchify_undoes_patchify():
    latents = jax.random.normal(jax.random.key(0), (2, 3, 4, 6, 5))
    tokens = dit.patchify(latents)
    assert tokens.shape == (2, 18, 20)
    np.testing.assert_array_equal(dit.unpatchify(tokens, 3, 4, 6), latents)
    # The first row of tokens: column outermost, then frame, then row.
    np.testing.assert_array_equal(tokens[0, 2, :5], latents[0, 1, 0, 0])
    np.testing.assert_array_equal(tokens[0, 6, :5], latents[0, 0, 0, 2])


def test_rotation_depends_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 20))
    table = dit.rotary_table(20, 4, 8, 8)

    def product(i, j):
        n = lambda t, h, w: (w * 4 + t) * 4 + h  # noqa: E731
        turned = [
            dit.rotate(x, tuple(part[n(*place)][None] for part in table))
            for x, place in ((q, i), (k, j))
        ]
        return float((turned[0] * turned[1]).sum())

    assert product((0, 1, 2), (1, 3, 2)) == pytest.approx(product((2, 0, 1), (3, 2, 1)), abs=1e-5)
    assert product((0, 1, 2), (1, 3, 2)) != pytest.approx(product((0, 0, 0), (0, 0, 0)), abs=1e-2)


def test_inputs_that_do_not_fit_are_refused():
    latents, time, text, context = arguments(SMALL)

    def call(cfg, *inputs):
        jax.eval_shape(DiT(cfg).init, jax.random.key(0), *inputs)

    for cfg, inputs, message in (
        (SMALL, (latents[:, :, :3], time, text, context), "even height"),
        (SMALL, (latents[..., :3], time, text, context), "4 channels"),
        (SMALL, (latents, time, jnp.zeros((2, 9, 12)), context), "or fewer rows"),
        (SMALL, (latents, time, None, context), "text None"),
        (dataclasses.replace(PLAIN, text_length=0), (latents, time, text), "expected None"),
        (SMALL, (latents, time, text), "context None"),
        (PLAIN, (latents, time, text, context), "expected None"),
    ):
        with pytest.raises(ValueError, match=message):
            call(cfg, *inputs)
    for wrong in ({"heads": 5}, {"context_every": 3}, {"frequencies": 3}):
        with pytest.raises(ValueError):
            dataclasses.replace(SMALL, **wrong)
