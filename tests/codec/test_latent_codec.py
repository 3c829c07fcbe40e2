"""The latent codec: sizes, masks, and the training form against the coding form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from scipy.stats import norm

from gnvc_jax.codec import density
from gnvc_jax.codec.config import CodecConfig
from gnvc_jax.codec.entropy import LatentSymbols, spatial_masks
from gnvc_jax.codec.model import CodecState, LatentCodec, init_codec, pad_latents
from gnvc_jax.codec.quantise import bound, round_ste
from gnvc_jax.codec.scales import scale_layers
from gnvc_jax.codec.transform import GAIN_SLOPE

TINY = CodecConfig(
    latent_channels=4,
    intra_width=8,
    width=8,
    intra_analysis=1,
    intra_synthesis=1,
    y_channels=8,
    z_channels=4,
    scale_width=8,
    entropy_width=16,
    inter_context=1,
    inter_analysis=1,
    inter_synthesis=1,
    k_skip=0,  # training skips nothing
)


def shapes(config):
    return jax.eval_shape(lambda key: init_codec(LatentCodec(config), key), jax.random.key(0))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(3)
    starts = {layer.name: layer.start for layer in scale_layers(TINY)}

    def draw(path, leaf):
        name, fan_in = path[-1].key, max(1, int(np.prod(leaf.shape[:-1])))
        scale = {"kernel": 0.7 * fan_in**-0.5, "log_gain": 0.2}.get(name, 0.1)
        if any(p.key == "scales" for p in path):
            scale = 0.3 if name.endswith("kernel") else 0.01
            if name.endswith("bias"):
                return np.full(leaf.shape, starts[name[:2]], np.float32)
        return rng.normal(0, scale, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes(TINY))


def test_full_size_has_about_sixteen_million_parameters():
    count = sum(x.size for x in jax.tree.leaves(shapes(CodecConfig())))
    assert 15e6 < count < 18e6


@pytest.mark.parametrize("passes", [2, 4])
def test_spatial_masks_visit_every_element_once(passes):
    masks = spatial_masks(passes, 6, 4, 8)
    np.testing.assert_array_equal(masks.sum(axis=0), 1)
    # After the first pass every position knows a share 1 / passes of its channels.
    np.testing.assert_allclose(masks[0].mean(axis=-1), 1 / passes)
    # Every channel is coded at a share 1 / passes of the positions of each pass.
    np.testing.assert_allclose(masks.mean(axis=(1, 2)), 1 / passes)


def test_training_and_coding_forms_agree(params):
    """The same integers and reconstructions from the scan with gradients and step by step."""
    codec = LatentCodec(TINY)
    latents = jax.random.normal(jax.random.key(0), (1, 3, 8, 16, 4))
    q_index = jnp.asarray([40])
    trained = jax.jit(lambda p: codec.apply({"params": p}, latents, q_index, jax.random.key(1)))(
        params
    )

    @jax.jit  # twice: without a state, and with one
    def code(latent, state):
        given = {"params": params}
        integers = codec.apply(given, latent, state, q_index, method="encode")
        return integers, *codec.apply(given, integers, state, q_index, method="decode")

    state = None
    for t in range(3):
        integers, decoded, state = code(latents[:, t], state)
        np.testing.assert_allclose(decoded.feature, trained.feature[:, t], atol=1e-4)
        for ours, theirs in zip(integers, trained.symbols, strict=True):
            np.testing.assert_array_equal(ours, theirs[:, t])
        np.testing.assert_allclose(decoded.latent, trained.latent[:, t], atol=1e-4)
    assert np.abs(trained.symbols.y).max() >= 1  # there is something to code
    assert len(np.unique(trained.symbols.index)) > 4


def test_untrained_codec_is_a_transform_coder(start_codec):
    """Networks start at zero: y is the basis times the residual, and comes back by its inverse."""
    codec = LatentCodec(TINY)
    latents = jax.random.normal(jax.random.key(0), (2, 2, 8, 8, 4))
    q_index, key = jnp.asarray([0, 63]), jax.random.key(1)
    params = start_codec(codec)

    @jax.jit
    def both(params):
        given = {"params": params}
        state, first = codec.apply(given, latents[:, 0], None, q_index, key, method="train")
        return first, codec.apply(given, latents[:, 1], state, q_index, key, method="train")[1]

    first, second = both(params)
    gains = np.exp([0.0, GAIN_SLOPE])[:, None, None, None]
    for part, coded, residual in (
        ("intra", first, latents[:, 0]),
        ("inter", second, latents[:, 1] - first.latent),
    ):
        basis, gain = params[part]["basis"], gains
        cells = rearrange(residual, "b (h i) (w j) c -> b h w (i j c)", i=2, j=2)
        symbols = np.round(np.asarray(cells @ basis) * gain)
        assert np.mean(symbols == coded.symbols.y) > 0.999  # ties apart
        back = rearrange(
            (symbols / gain) @ np.asarray(basis).T, "b h w (i j c) -> b (h i) (w j) c", i=2, j=2
        )
        decoded = back + (first.latent if part == "inter" else 0.0)
        assert np.mean(np.abs(decoded - coded.latent) < 1e-4) > 0.99


def test_given_prediction_replaces_the_last_latent(params):
    codec, key, q_index = LatentCodec(TINY), jax.random.key(1), jnp.asarray([40])
    latents = jax.random.normal(jax.random.key(0), (2, 1, 8, 8, 4))

    @jax.jit
    def second(prediction):
        variables = {"params": params}
        state, _ = codec.apply(variables, latents[0], None, q_index, key, method="train")
        return codec.apply(variables, latents[1], state, q_index, key, prediction, method="train")[
            1
        ].latent, state.latent

    own, last = second(None)
    np.testing.assert_allclose(second(last)[0], own, atol=1e-5)
    assert np.abs(second(last + 1.0)[0] - own).max() > 0.1


@pytest.mark.slow
def test_every_parameter_has_a_gradient(params):
    codec = LatentCodec(TINY)
    latents = 5.0 * jax.random.normal(jax.random.key(0), (2, 3, 8, 8, 4))  # some z are not 0

    def loss(p):
        out = codec.apply({"params": p}, latents, jnp.asarray([0, 63]), jax.random.key(1))
        return jnp.mean((out.latent - latents) ** 2) + 1e-3 * jnp.mean(out.y_bits + out.z_bits)

    grads = jax.jit(jax.grad(loss))(params)
    still = []
    grads["intra"].pop("whitening"), grads["inter"].pop("whitening")  # statistics, not learned
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all(), path
        if np.abs(grad).max() == 0:
            still.append(jax.tree_util.keystr(path))
    assert not still


def test_cheapest_symbols_are_those_of_brute_force():
    rng = np.random.default_rng(0)
    x, sigma = rng.normal(0, 3, 2000), rng.uniform(0.11, 8, 2000)
    for worth in (0.1, 1.0, 10.0):
        got = np.asarray(density.cheapest_symbols(jnp.asarray(x), jnp.asarray(sigma), worth))
        # The nearest whole number and the one before it, seen from zero.
        nearest = np.round(x)
        known = np.stack([nearest, nearest - np.sign(nearest)])
        mass = norm.cdf(known + 0.5, scale=sigma) - norm.cdf(known - 0.5, scale=sigma)
        costs = worth * (x - known) ** 2 - np.log2(np.maximum(mass, density.LIKELIHOOD_MIN))
        chosen = np.where(got == known[0], costs[0], costs[1])
        assert np.isin(got - nearest, [0, *(-np.sign(nearest))]).all()
        np.testing.assert_allclose(chosen, costs.min(0), atol=1e-3)


def test_gaussian_bits_match_scipy():
    x = np.linspace(-30, 30, 241)
    for sigma in (0.11, 0.5, 3.0, 16.0):
        exact = -np.log2(np.maximum(norm.cdf(x + 0.5, scale=sigma) - norm.cdf(x - 0.5, scale=sigma),
                                    density.LIKELIHOOD_MIN))  # fmt: skip
        got = density.gaussian_bits(jnp.asarray(x, jnp.float32), sigma)
        keep = exact < 20  # beyond it float32 differences of the two tails lose digits
        np.testing.assert_allclose(got[keep], exact[keep], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
def test_hyperlatent_table_agrees_with_the_trained_density(symmetric):
    model = density.FactorisedDensity(3)
    shapes = jax.eval_shape(functools.partial(model.init, method="bits"), jax.random.key(0),
                            jnp.zeros((1, 1, 1, 3)), jnp.zeros(1, int))["params"]  # fmt: skip
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.3, x.shape)), shapes)
    if symmetric:
        params |= {name: jax.tree.map(jnp.zeros_like, params[name]) for name in ("a", "b")}
    table = density.probabilities(params)
    assert table.shape == (64, 3, 31)
    np.testing.assert_allclose(table.sum(axis=-1), 1.0)
    x = jnp.arange(-14, 15, dtype=jnp.float32)[None, None, :, None] * jnp.ones((1, 1, 29, 3))
    bits = jax.jit(functools.partial(model.apply, method="bits"))(
        {"params": params}, x, jnp.asarray([17])
    )
    np.testing.assert_allclose(2.0 ** -bits[0, 0].T, table[17, :, 1:-1], rtol=1e-3, atol=1e-6)


def test_gradients_of_bound_lead_back_inside():
    def grad(x, direction):
        return float(jax.grad(lambda v: direction * bound(v, 0.0, 1.0))(jnp.float32(x)))

    assert grad(0.5, 1.0) == 1.0
    assert grad(-1.0, 1.0) == 0.0  # a descent step would lead further out
    assert grad(-1.0, -1.0) == -1.0
    assert grad(2.0, 1.0) == 1.0
    assert float(round_ste(jnp.float32(1.6))) == 2.0
    assert float(jax.grad(round_ste)(jnp.float32(1.6))) == 1.0


def test_latents_are_padded_by_their_edge():
    latents = jnp.arange(5 * 9.0).reshape(1, 1, 5, 9, 1)
    padded = pad_latents(latents)
    assert padded.shape == (1, 1, 8, 16, 1)
    assert padded[0, 0, 7, 15, 0] == latents[0, 0, 4, 8, 0]


def test_cells_without_symbols_copy_the_prediction():
    """Elsewhere the latent changes, even where networks answer to nothing; without motion none is
    a copy."""
    config = dataclasses.replace(TINY, motion="blocks")
    codec, q_index = LatentCodec(config), jnp.asarray([30])
    latents = jax.random.normal(jax.random.key(0), (1, 2, 8, 8, 4))
    rng = np.random.default_rng(4)
    drawn = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes(config))
    symbols = np.zeros((1, 4, 4, config.y_channels), np.float32)
    symbols[0, 1, 2, 3] = 1
    z = np.zeros((1, 1, 1, config.z_channels), np.float32)
    integers = LatentSymbols(z, symbols, np.zeros_like(symbols))
    state = CodecState(latents[:, 0], None, integers)
    prediction = latents[:, 1]
    decoded, _ = jax.jit(functools.partial(codec.apply, method="decode"))(
        {"params": drawn}, integers, state, q_index, prediction
    )
    changed = np.any(np.asarray(decoded.latent != prediction), axis=-1)[0]
    expected = np.zeros((8, 8), bool)
    expected[2:4, 4:6] = True
    np.testing.assert_array_equal(changed, expected)
    np.testing.assert_array_equal(decoded.fresh[0, ..., 0], expected)
    assert (np.asarray(decoded.detail)[0, ~expected] == 1).all()
    assert (np.asarray(decoded.detail)[0, expected] < 1).all()


def test_copies_learn_as_if_they_were_coded(start_codec):
    """With networks at zero: latents with `skipped` have the gradient of the basis everywhere."""
    config = dataclasses.replace(TINY, motion="blocks")
    codec, q_index, key = LatentCodec(config), jnp.asarray([40]), jax.random.key(5)
    latents = jax.random.normal(jax.random.key(0), (1, 2, 8, 8, 4))
    drawn = start_codec(codec)
    prediction = latents[:, 1].at[:, 2:4, 4:6].add(20.0)  # to be coded; the rest is right

    @jax.jit
    def decoded(latent):
        given = {"params": drawn}
        state, _ = codec.apply(given, latents[:, 0], None, q_index, key, method="train")
        arguments = latent, state, q_index, key, prediction
        return codec.apply(given, *arguments, method="train")[1]

    output = decoded(latents[:, 1])
    fresh = np.asarray(output.fresh)
    assert 0 < fresh.mean() < 1
    np.testing.assert_array_equal((1 - fresh) * (output.latent - prediction), 0)
    np.testing.assert_array_equal(fresh * output.skipped, 0)

    weights = jax.random.normal(key, prediction.shape)
    _, pullback = jax.vjp(lambda x: (decoded(x).latent, decoded(x).skipped), latents[:, 1])
    (got,) = pullback((weights, weights))
    cells = rearrange(np.asarray(weights), "b (h i) (w j) c -> b h w (i j c)", i=2, j=2)
    basis = np.asarray(drawn["inter"]["basis"])
    expected = rearrange(cells @ basis @ basis.T, "b h w (i j c) -> b (h i) (w j) c", i=2, j=2, c=4)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    (copied,) = pullback((weights * (1 - fresh), jnp.zeros_like(weights)))
    np.testing.assert_array_equal(copied, 0)
