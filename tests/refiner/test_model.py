"""The refiner: condition, neutral start, and windows over long groups."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnvc_jax.refiner import DiT, DiTConfig, Refiner, RefinerConfig, flow, init_refiner, refine
from gnvc_jax.refiner.dit import patchify, per_token
from gnvc_jax.refiner.model import latent_noise, vace_context, window_starts, window_weights

DIT = DiTConfig(
    width=32,
    ffn_width=32,
    heads=2,
    layers=2,
    frequencies=8,
    channels=4,
    text_width=5,
    text_length=3,
    context_every=2,
    context_channels=2 * 4 + 64,
)
VACE = RefinerConfig(DIT, features=6)
SMALL = RefinerConfig(
    dataclasses.replace(DIT, context_channels=4, text_length=0), features=6, deviation=0.3
)


def inputs(b=2, t=2, h=4, w=4):
    keys = jax.random.split(jax.random.key(0), 3)
    state, decoded = (jax.random.normal(k, (b, t, h, w, 4)) for k in keys[:2])
    features = jax.random.normal(keys[2], (b, t, h, w, 6))
    return state, jnp.linspace(0.7, 0.9, b), decoded, features, jnp.arange(b * t).reshape(b, t) + 5


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, *inputs):
    return model.apply({"params": params}, *inputs)


def filled(tree, seed=0):
    """Random values everywhere, also where training starts at zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), tree)


def test_a_ported_model_is_unchanged_at_first(start):
    """Random DiT weights under fresh codec conditions: the DiT's own answer, sign changed."""
    state, tau, decoded, features, q_index = inputs()
    text = jnp.ones((2, 2, 5))
    refiner = Refiner(VACE)
    params = start(lambda key: init_refiner(refiner, key), "features", "quality", "grey")
    params |= {"dit": filled(params["dit"])}
    ours = apply(refiner, params, state, tau, decoded, features, q_index, text)
    context = vace_context(decoded, params["grey"])
    theirs = apply(DiT(DIT), params["dit"], state, 1000 * (1 - tau), text, context)
    assert float(jnp.abs(theirs).max()) > 0.1
    np.testing.assert_allclose(ours, -theirs, rtol=1e-5, atol=1e-6)

    for part in ("features", "quality"):
        changed = params | {part: filled(params[part])}
        other = apply(refiner, changed, state, tau, decoded, features, q_index, text)
        assert float(jnp.abs(other - ours).max()) > 1e-3, part


def test_a_small_refiner_gives_the_decoded_latents_at_first(start):
    _, _, decoded, features, q_index = inputs()
    refiner = Refiner(SMALL)
    state = flow.start_state(decoded, latent_noise(jax.random.key(1), decoded.shape))
    arguments = jnp.full(2, 0.7), decoded, features, q_index
    params = start(lambda key: init_refiner(refiner, key), "head", "quality")
    velocity = apply(refiner, params, state, *arguments)
    np.testing.assert_allclose(flow.clean_estimate(state, velocity, 0.7), decoded, atol=1e-5)


def test_modulation_of_each_latent_reaches_its_own_tokens():
    """Against latents that hold their own number: `patchify` says which token is whose."""
    b, t, h, w = 2, 3, 4, 6
    number = jnp.arange(b * t, dtype=jnp.float32).reshape(b, t)
    tokens = patchify(jnp.broadcast_to(number[:, :, None, None, None], (b, t, h, w, 1)))
    rows = jnp.stack([number, -number], axis=2)[..., None]
    first, second = per_token(rows, (t, h // 2, w // 2))
    np.testing.assert_array_equal(first, tokens[..., :1])
    np.testing.assert_array_equal(second, -tokens[..., :1])


def test_levels_of_latents_count_each_for_itself(start):
    """The level of one latent changes the answer; equal ones give that of a level for all."""
    state, tau, decoded, features, q_index = inputs()
    refiner = Refiner(SMALL)
    params = filled(start(lambda key: init_refiner(refiner, key)))
    given = state, tau, decoded, features
    ours = apply(refiner, params, *given, q_index)
    for latent in range(q_index.shape[1]):
        other = apply(refiner, params, *given, q_index.at[:, latent].add(20))
        change = jnp.abs(other - ours).max((0, 2, 3, 4))
        assert change.argmax() == latent
    equal = apply(refiner, params, *given, jnp.full_like(q_index, 9))
    np.testing.assert_allclose(
        apply(refiner, params, *given, jnp.full((2, 1), 9)), equal, atol=1e-5
    )


def test_refinement_without_noise_is_deterministic():
    _, _, *conditions = inputs()
    config, decoded = dataclasses.replace(SMALL, noise=0.0), conditions[0]

    def refined(config, seed):
        def velocity(state, tau, decoded, features, q_index):
            return state - 2.0 * decoded

        return refine(velocity, config, *conditions, jax.random.key(seed), 1)

    np.testing.assert_array_equal(refined(config, 0), refined(config, 1))
    assert float(jnp.abs(refined(SMALL, 0) - refined(SMALL, 1)).max()) > 0.1
    # One Euler step of 0.3 from 0.7 of the decoded latents: 0.7 + 0.3 * (0.7 - 2).
    np.testing.assert_allclose(refined(config, 0), 0.31 * decoded, rtol=1e-5)


def test_vace_context_has_grey_decoded_and_mask_channels():
    decoded, grey = inputs()[2], jnp.arange(8.0).reshape(2, 4)
    condition = vace_context(decoded, grey)
    assert condition.shape == (2, 2, 4, 4, 72)
    np.testing.assert_array_equal(condition[1, 0, 2, 3, :4], grey[0])
    np.testing.assert_array_equal(condition[0, 1, 0, 0, :4], grey[1])
    np.testing.assert_array_equal(condition[..., 4:8], decoded)
    assert (condition[..., 8:] == 1).all()


@pytest.mark.parametrize("count", [1, 3, 5, 6, 7, 12, 25, 26, 27, 100])
@pytest.mark.parametrize(("size", "overlap"), [(5, 2), (7, 0), (7, 6)])
def test_windows_cover_a_group_and_overlap(count, size, overlap):
    starts = window_starts(count, size, overlap)
    covered = [set(range(s, s + min(size, count))) for s in starts]
    assert set().union(*covered) == set(range(count))
    assert all(len(a & b) >= overlap for a, b in itertools.pairwise(covered))
    # No more windows than are needed.
    assert len(starts) <= 1 + max(0, -(-(count - size) // (size - overlap)))


def test_window_weights_are_linear_ramps():
    np.testing.assert_allclose(window_weights(5, 2, True, True), np.ones(5))
    np.testing.assert_allclose(window_weights(5, 2, False, True), [1 / 3, 2 / 3, 1, 1, 1])
    np.testing.assert_allclose(window_weights(5, 2, True, False), [1, 1, 1, 2 / 3, 1 / 3])


@pytest.mark.parametrize("t", [1, 7, 8, 19])
@pytest.mark.parametrize("steps", [1, 3])
def test_windows_leave_a_pointwise_flow_as_it_is(t, steps):
    """A velocity that treats latents one by one does not notice windows: any seam would show."""
    config = dataclasses.replace(VACE, window=7, overlap=2)
    _, _, decoded, features, q_index = inputs(1, t)
    clean = decoded + 0.2 * features[..., :4]
    seen = []

    def velocity(state, tau, decoded, features, q_index):
        seen.append(state.shape[1])
        np.testing.assert_array_equal(jnp.diff(q_index), 1)  # as many, of the same latents
        return (decoded + 0.2 * features[..., :4] - state) / (1 - tau)

    conditions = decoded, features, q_index
    refined = refine(velocity, config, *conditions, jax.random.key(0), steps)
    np.testing.assert_allclose(refined, clean, atol=1e-5)
    assert set(seen) == {min(t, 7)}
    np.testing.assert_array_equal(
        refine(velocity, config, *conditions, jax.random.key(0), 0), decoded
    )


def test_overlapping_windows_are_averaged_without_a_jump():
    """Where two windows disagree, the result goes from one to the other without a jump."""
    config = dataclasses.replace(VACE, window=7, overlap=4)
    decoded = jnp.zeros((1, 10, 2, 2, 4))
    q_index, calls = jnp.zeros((1, 10), int), []

    def velocity(state, tau, decoded, features, q_index):
        calls.append(len(calls))
        return (float(calls[-1]) - state) / (1 - tau)  # the first window wants 0, the second 1

    conditions = decoded, decoded, q_index
    refined = refine(velocity, config, *conditions, jax.random.key(0), 1)[0, :, 0, 0, 0]
    np.testing.assert_allclose(refined, [0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1], atol=1e-6)


def test_noise_depends_on_the_position_in_the_group():
    key = jax.random.key(3)
    whole = latent_noise(key, (2, 6, 3, 3, 4))
    np.testing.assert_array_equal(latent_noise(key, (2, 2, 3, 3, 4), first=3), whole[:, 3:5])
    assert abs(float(whole.std()) - 1) < 0.1
    assert float(jnp.abs(whole[:, 0] - whole[:, 1]).min()) > 0


def test_impossible_configurations_are_refused():
    for wrong in (
        {"overlap": 7},
        {"overlap": -1},
        {"dit": dataclasses.replace(DIT, context_channels=10)},
    ):
        with pytest.raises(ValueError):
            dataclasses.replace(VACE, **wrong)
