"""Quality levels that differ within a group, and numbers of refinement steps that are drawn."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refiner_runs import as_codec

from gnvc_jax.codec.model import LatentCodec
from gnvc_jax.errors import UsageError
from gnvc_jax.training.rollout import CodecOutput, LevelPattern, draw_levels
from gnvc_jax.training.stages import codec as codec_stage
from gnvc_jax.training.stages import make_stage
from gnvc_jax.training.stages.codec import CodecLoss
from gnvc_jax.training.stages.pixel import PixelLoss


def test_latents_of_a_group_are_coded_at_their_own_levels(tiny_codec):
    """The whole group at once, against one latent after another."""
    codec, rng = LatentCodec(tiny_codec), np.random.default_rng(0)
    latents = jnp.asarray(rng.normal(size=(2, 3, 8, 8, 4)), jnp.float32)
    levels, key = jnp.asarray([[20, 3, 40], [50, 63, 0]]), jax.random.key(1)
    shapes = jax.eval_shape(codec.init, key, latents, levels, key)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), shapes)
    found = jax.jit(codec.apply)(params, latents, levels, key)
    one = jax.jit(lambda *args: codec.apply(params, *args, method="train"))
    state = None
    for t, own in enumerate(jax.random.split(key, 3)):
        state, coded = one(latents[:, t], state, levels[:, t], own)
        np.testing.assert_allclose(found.latent[:, t], coded.latent, atol=1e-5)
        np.testing.assert_allclose(found.y_bits[:, t], coded.y_bits, rtol=1e-4)


def test_errors_count_by_the_lambda_of_their_latent(base, monkeypatch):
    """Lambda rises tenfold over 63 levels; the first latent is 21 of them better."""
    rate, error = jnp.asarray([0.1, 0.2]), jnp.asarray([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    q_index = jnp.asarray([0, 42])
    levels = q_index[:, None] + jnp.asarray([21, 0, 0])

    def roll_out(networks, params, constants, batch, key, pattern):
        assert pattern.intra_offset == (21, 21)
        empty = jnp.zeros(())
        return CodecOutput(
            empty, empty, empty, q_index, levels, rate, rate, error.mean(1), error, {}
        )

    monkeypatch.setattr(codec_stage, "roll_out", roll_out)
    settings = CodecLoss(lambda_low=0.05, lambda_high=0.5, balance=0.0, intra_offset=(21, 21))
    experiment = dataclasses.replace(as_codec(base), loss=settings)
    loss, _ = make_stage(experiment).loss({}, {}, None, jax.random.key(0), 0)
    tenth = 10 ** (1 / 3)
    costs = [
        0.05 * (tenth * 1 + 2 + 3) / 3 + 0.1,
        0.05 * 10 ** (2 / 3) * (tenth * 4 + 5 + 6) / 3 + 0.2,
    ]
    np.testing.assert_allclose(loss, np.mean(costs), rtol=1e-5)


def test_a_group_has_one_level_by_default():
    q_index = jnp.asarray([0, 31, 63])
    levels = draw_levels(jax.random.key(0), LevelPattern(), q_index, 4)
    np.testing.assert_array_equal(levels, np.repeat([[0], [31], [63]], 4, 1))
    worth = codec_stage.worth_of_latents(
        CodecLoss(), types.SimpleNamespace(levels=levels, q_index=q_index)
    )
    np.testing.assert_array_equal(worth, np.ones((3, 4)))  # exactly: nothing changes without


def test_numbers_of_steps_are_drawn():
    keys = jax.random.split(jax.random.key(0), 2000)
    for settings, wanted in (
        (PixelLoss(fewest_steps=1, single=0.0), {n: 0.2 for n in range(1, 6)}),
        (PixelLoss(), {1: 0.25, 5: 0.75}),
        (PixelLoss(steps=4, fewest_steps=3, single=0.5), {1: 0.5, 3: 0.25, 4: 0.25}),
    ):
        numbers, counts = np.unique(jax.vmap(settings.draw_steps)(keys), return_counts=True)
        found = dict(zip(numbers.tolist(), counts / 2000))
        assert found == pytest.approx(wanted, abs=0.04)
        mean = sum(n * share for n, share in wanted.items())
        assert settings.mean_steps == pytest.approx(mean)
    for wrong in ({"fewest_steps": 6}, {"fewest_steps": 0}, {"single": 1.5}, {"pattern": ()}):
        with pytest.raises(UsageError, match=r"loss\."):
            PixelLoss(**wrong)
