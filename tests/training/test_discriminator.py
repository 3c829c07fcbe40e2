"""The adversarial loss: its two sides, its values, and runs with and without a discriminator."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_stage
from refiner_runs import STATISTICS, batch, started

from gnvc_jax.errors import UsageError
from gnvc_jax.metrics.backbones import load_weights
from gnvc_jax.metrics.lpips import lpips_features
from gnvc_jax.training import loop, losses, stages
from gnvc_jax.training.checkpoints import Checkpoints
from gnvc_jax.training.config import OptimConfig
from gnvc_jax.training.discriminator import (
    AdversarialConfig,
    AdversarialLoss,
    Discriminator,
    adversarial_loss,
    init_discriminator,
    trainable,
)
from gnvc_jax.training.release import build_model
from gnvc_jax.training.stages import make_stage
from gnvc_jax.training.stages.pixel import PixelLoss
from gnvc_jax.training.state import init_state, optimizer
from gnvc_jax.training.step import make_step

TINY = AdversarialConfig(weight=0.1, warmup=2, start=1, width=4, downscale=2)
FRAMES = PixelLoss(lpips_net="alex", steps=2, lpips=0.0, adversarial=TINY)


@pytest.fixture(scope="module")
def params():
    return init_discriminator(TINY, jax.random.key(0))["discriminator"]


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.uniform(-1, 1, (2, 2, 64, 64, 3)), jnp.float32) for _ in range(2)]


def test_hinge_losses_by_hand():
    real, decoded = jnp.asarray([[0.5, 3.0]]), jnp.asarray([[-2.0, 0.5]])
    # Beyond the margins nothing is left to gain: (0.5 + 0) / 2 + (0 + 1.5) / 2.
    np.testing.assert_allclose(losses.hinge_discriminator(real, decoded), [1.0])
    np.testing.assert_allclose(losses.hinge_generator(decoded), [0.75])


def test_each_side_has_gradients_of_its_own(params, pair):
    def side(name, params, output, video):
        return getattr(adversarial_loss(TINY, params, output, video, jnp.int32(9)), name).sum()

    for name in ("generator", "discriminator"):
        reached = jax.grad(side, (1, 2, 3))
        network, output, video = jax.tree.map(
            lambda x: float(jnp.abs(x).max()), reached(name, params, *pair)
        )
        moved = max(jax.tree.leaves(network))
        assert (moved > 0) == (name == "discriminator") and (output > 0) == (name == "generator")
        assert video == 0 or name == "discriminator"  # data, which nothing trains


def test_it_starts_in_two_steps(params, pair):
    """First nothing, then the discriminator alone, then both."""
    found = [adversarial_loss(TINY, params, *pair, jnp.int32(step)) for step in range(4)]
    assert [bool(jnp.any(one.discriminator != 0)) for one in found] == [False, True, True, True]
    assert [bool(jnp.any(one.generator != 0)) for one in found] == [False, False, False, True]
    judged = Discriminator(TINY).apply({"params": params}, pair[0].reshape(4, 64, 64, 3))
    wanted = -judged.reshape(2, -1).mean(1)
    np.testing.assert_allclose(found[3].generator, wanted, rtol=1e-4)


def test_the_discriminator_trains_without_a_share_of_the_loss():
    def training(x):
        return AdversarialLoss(x, x**2).training

    value, slope = jax.value_and_grad(training)(3.0)
    assert value == 0 and slope == 6


def test_gradients_of_both_sides_are_clipped_apart():
    config = OptimConfig(clip=1.0, weight_decay=0.0)
    grads = {"codec": jnp.full(4, 100.0), "discriminator": jnp.full(4, 0.1)}
    adversary = {"codec": False, "discriminator": True}
    decayed = {"codec": False, "discriminator": False}
    chain = optimizer(config, decayed, adversary)
    _, state = chain.update(grads, chain.init(grads), grads)
    first = state[1].mu  # 1 - beta_1 of the clipped gradient
    np.testing.assert_allclose(first["codec"], 0.1 * 0.5, rtol=1e-5)
    np.testing.assert_allclose(first["discriminator"], 0.1 * 0.1, rtol=1e-5)


def test_feature_matching_is_relative():
    network = load_weights("alex")
    rng = np.random.default_rng(1)
    x, y = (jnp.asarray(rng.uniform(-1, 1, (2, 64, 64, 3)), jnp.float32) for _ in range(2))
    fx, fy = lpips_features(network, x), lpips_features(network, y)
    wanted = [np.abs(a - b).mean((1, 2, 3)) / np.abs(b).mean((1, 2, 3)) for a, b in zip(fx, fy)]
    found = losses.feature_matching(fx, fy)
    np.testing.assert_allclose(found, np.mean(wanted, 0), rtol=1e-5)
    np.testing.assert_array_equal(losses.feature_matching(fx, fx), 0)
    # Louder features of both count alike.
    louder = losses.feature_matching([10 * a for a in fx], [10 * b for b in fy])
    np.testing.assert_allclose(louder, found, rtol=1e-5)


def pixel(base, loss):
    """The stage `pixel` of a codec alone."""
    return dataclasses.replace(base, stage="pixel", refiner=None, train=("codec/",), loss=loss)


def test_without_weight_there_is_no_discriminator(base):
    plain = dataclasses.replace(FRAMES, adversarial=AdversarialConfig())
    shapes = [stages.model_shapes(make_stage(pixel(base, loss))) for loss in (plain, FRAMES)]
    assert set(shapes[1]) - set(shapes[0]) == {"discriminator"}
    assert "discriminator" not in set(shapes[0])
    constants = [make_stage(pixel(base, loss)).constant_shapes() for loss in (plain, FRAMES)]
    assert set(constants[0]) == set(constants[1]) and "dists" not in constants[0]
    dists = make_stage(pixel(base, dataclasses.replace(plain, dists=1.0))).constant_shapes()
    assert "dists" in dists
    for wrong in ({"weight": -1.0}, {"downscale": 0}):
        with pytest.raises(UsageError, match=r"loss\.adversarial\."):
            AdversarialConfig(**wrong)


def brightness_stage(experiment):
    """A generator of one number, which makes dark frames brighter, against a discriminator."""
    toy, settings = toy_stage.toy_stage(experiment), dataclasses.replace(TINY, start=0)

    def loss(params, constants, batch, key, step):
        stripes = jnp.tanh(batch["x"]).repeat(16, 1)[:, None, None, :, None]
        video = stripes * jnp.ones((2, 64, 64, 3))
        output = video - 0.5 + params["codec"]["gain"]
        game = adversarial_loss(settings, params["discriminator"], output, video, step)
        return game.generator.mean() + game.training, game.metrics

    return dataclasses.replace(
        toy,
        init=lambda key: {"codec": {"gain": jnp.zeros(())}} | init_discriminator(settings, key),
        loss=loss,
        trainable=("codec/", *trainable(settings)),
    )


def test_a_resumed_game_has_the_same_losses(tmp_path):
    """Both sides, their moments and their averages come from the checkpoint."""
    base = toy_stage.experiment_in(tmp_path)
    experiment = dataclasses.replace(
        base,
        optim=OptimConfig(lr=1e-2, warmup=0, steps=5),
        run=dataclasses.replace(base.run, checkpoint_every=3),
    )

    def read():
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        names = "generator", "discriminator", "loss", "norm/update_discriminator"
        return [[json.loads(line)[name] for name in names] for line in lines]

    whole = loop.train(brightness_stage(experiment))
    losses_of_whole = read()
    shutil.rmtree(tmp_path / "checkpoints" / "5")
    again = loop.train(brightness_stage(experiment))
    assert read() == losses_of_whole and len(losses_of_whole) == 5
    assert whole is not None and again is not None
    for a, b in ((whole.params, again.params), (whole.opt_state[1], again.opt_state[1])):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    # The generator waits for the discriminator, which then finds frames too dark.
    generator, discriminator = np.asarray(losses_of_whole).T[:2]
    assert (generator[:2] == 0).all() and (generator[2:] != 0).all()
    assert discriminator[0] == pytest.approx(2, abs=0.5) and (discriminator > 0).all()
    assert float(whole.params["codec"]["gain"]) != 0


@pytest.mark.slow
@pytest.mark.parametrize("terms", [{}, {"dists": 0.5, "features": 0.5}])
def test_a_run_on_frames(base, tmp_path, terms):
    """Codec and decoder of a tiny model play against a discriminator, and the run is released."""
    loss = dataclasses.replace(FRAMES, **terms)
    experiment = pixel(base, loss)
    stage, params, frozen = started(experiment)
    state = init_state(OptimConfig(lr=1e-3, warmup=0), params, jax.random.key(0))
    step = jax.jit(make_step(OptimConfig(lr=1e-3, warmup=0), stages.objective(stage)))
    for count in range(5):
        state, metrics = step(state, frozen, batch())
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(metrics))
        assert (metrics["discriminator"] > 0) == (count >= TINY.start)
        assert (metrics["generator"] != 0) == (count >= TINY.start + TINY.warmup)
        assert terms.keys() <= metrics.keys()
    # A release has the model, and no discriminator.
    run = dataclasses.replace(experiment.run, out=str(tmp_path / "run"))
    experiment = dataclasses.replace(experiment, run=run)
    stages.keep(make_stage(experiment), STATISTICS)
    checkpoints = Checkpoints(experiment)
    checkpoints.save(5, state, {}, STATISTICS)
    checkpoints.close()
    model = build_model(run.out, "mine")
    np.testing.assert_allclose(
        model.codec["intra"]["out"]["kernel"],
        state.ema["codec"]["intra"]["out"]["kernel"],
        rtol=2e-3,  # half precision
    )
