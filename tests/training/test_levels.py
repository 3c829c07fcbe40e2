"""Metrics by quality level, and shares of symbols, of hand-made batches."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_stage

from gnvc_jax.codec.entropy import LatentSymbols
from gnvc_jax.parallel import MeshConfig, make_mesh
from gnvc_jax.planner.training import abstract_arguments
from gnvc_jax.refiner import DiTConfig, RefinerConfig
from gnvc_jax.training import stages
from gnvc_jax.training.config import DataConfig, Experiment, InitConfig, OptimConfig
from gnvc_jax.training.levels import by_level, level_means
from gnvc_jax.training.loop import train
from gnvc_jax.training.rollout import symbol_shares
from gnvc_jax.training.stages import make_stage
from gnvc_jax.training.stages.codec import CodecLoss
from gnvc_jax.training.stages.latent import LatentLoss
from gnvc_jax.training.stages.pixel import PixelLoss
from gnvc_jax.training.stages.refine import RefineLoss
from gnvc_jax.training.stages.transform import TransformLoss
from gnvc_jax.training.step import gradient, make_step
from gnvc_jax.vae import VAEConfig

VAE = VAEConfig(base=4, multipliers=(1, 1, 1, 1), blocks=1, latent_channels=4)
LINEAR = VAEConfig(latent_channels=4, linear=True, head=4)
DIT = DiTConfig(16, 16, 2, 2, 8, 4, text_length=0, context_every=1, context_channels=4)
LEVELS = np.array([0, 15, 16, 40, 47, 63])
BPP = np.float32([1, 3, 5, 7, 8, 9])


def test_means_are_over_the_clips_of_a_band_in_all_steps():
    first, second = by_level(LEVELS, bpp=BPP), by_level(np.array([7, 63]), bpp=jnp.array([11.0, 1]))
    found = level_means("levels/bpp", [first["levels/bpp"], second["levels/bpp"]])
    expected = {"0_15": (1 + 3 + 11) / 3, "16_31": 5, "32_47": 7.5, "48_63": (9 + 1) / 2}
    assert found == {f"levels/bpp_{band}": value for band, value in expected.items()}
    # A band without clips has no mean, and a clip that is not finite leaves out its band.
    (only,) = by_level(np.array([20, 60]), bpp=jnp.array([2.0, np.nan])).values()
    assert level_means("x", [only]) == {"x_16_31": 2.0}


def test_micro_batches_leave_means_by_level_as_they_are():
    def loss(params, frozen, batch, key, step):
        return params * batch[:, 1].sum(), by_level(batch[:, 0].astype(int), bpp=batch[:, 1])

    batch = jnp.stack([jnp.asarray(LEVELS, jnp.float32), BPP], axis=1)
    means = []
    for parts in (1, 3):
        (_, metrics), _ = gradient(loss, parts)(jnp.ones(()), {}, batch, jax.random.key(0), 0)
        means.append(level_means("x", [metrics["levels/bpp"]]))
    assert means[1] == pytest.approx(means[0]) and len(means[0]) == 4


def test_a_run_logs_levels_and_norms(tmp_path):
    """Levels of eight clips and their numbers 0 to 7, the same in each of four steps."""
    base = toy_stage.experiment()
    run = dataclasses.replace(base.run, out=str(tmp_path), log_every=4)
    stage = toy_stage.toy_stage(dataclasses.replace(base, run=run))

    def loss(params, constants, batch, key, step):
        value, metrics = toy_stage.loss(params, constants, batch, key, step)
        numbers = jnp.arange(8)
        return value, metrics | by_level(numbers * 9, number=jnp.float32(numbers))

    train(dataclasses.replace(stage, loss=loss))
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    found = {name: value for name, value in line.items() if name.startswith("levels/")}
    expected = {"0_15": 0.5, "16_31": 2.5, "32_47": 4.5, "48_63": 6.5}
    assert found == {f"levels/number_{band}": value for band, value in expected.items()}
    assert {f"norm/{of}_w" for of in ("param", "grad", "update")} <= line.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["codec", "latent", "pixel", "transform", "refine"])
def test_stages_with_a_codec_have_levels_and_shares_of_symbols(name, tiny_codec):
    """The step is traced, in two micro-batches, and not compiled."""
    motion = name in ("transform", "refine")
    codec = dataclasses.replace(tiny_codec, motion="blocks" if motion else None)
    vae = LINEAR if motion else VAE
    steps = 5 if name == "pixel" else 1
    refiner = RefinerConfig(DIT, codec.width, 3, 1, steps=steps, deviation=0.3)
    losses = {
        "codec": CodecLoss(),
        "latent": LatentLoss(),
        "pixel": PixelLoss(lpips_net="alex"),
        "transform": TransformLoss(),
        "refine": RefineLoss(),
    }
    experiment = Experiment(
        name,
        vae,
        codec,
        refiner,
        init=InitConfig(run="a run"),
        train=("codec/", "refiner/"),
        loss=losses[name],
        data=DataConfig(frames=13, size=(64, 64), batch=4),
        optim=OptimConfig(accumulate=2),
    )
    stage = make_stage(experiment)
    with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
        mesh, shape = jax.sharding.get_mesh(), experiment.data.largest
        state, frozen, batch = abstract_arguments(stage, mesh, shape)
        step = make_step(experiment.optim, stages.objective(stage))
        _, metrics = jax.eval_shape(step, state, frozen, batch)
    shares = {"z_share", "skip_share", "clipped_share"}
    by_band = {f"levels/{value}" for value in ("loss", "bpp", "distortion")}
    norms = {f"norm/grad_{part}" for part in state.params}
    assert shares | by_band | norms <= metrics.keys()
    for key, value in metrics.items():
        assert {x.shape for x in jax.tree.leaves(value)} == {(4,) if "levels" in key else ()}


def test_symbols_that_are_skipped_and_that_are_clipped(tiny_codec):
    """Of 16 symbols of y 4 are skipped, one of them a large one; 2 of the others and 1 z are."""
    index = np.full((1, 2, 2, 4), tiny_codec.k_skip)
    index[0, 0, 0] = tiny_codec.k_skip - 1
    y, z = np.zeros_like(index), np.zeros((1, 1, 1, 4))
    y[0, 0, 0, 0], y[0, 1, 0, 0], y[0, 1, 1, 0], y[0, 1, 1, 1] = 127, 127, -127, 126
    z[..., 0], z[..., 1] = -15, 14
    skipped, clipped = symbol_shares(tiny_codec, LatentSymbols(*map(jnp.asarray, (z, y, index))))
    assert skipped == pytest.approx([4 / 16]) and clipped == pytest.approx([3 / (12 + 4)])
