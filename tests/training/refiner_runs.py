"""A tiny experiment of the stages with a refiner, and runs that it can start from.

The fixture `base` of this folder's conftest is made of these.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gnvc_jax.refiner import DiTConfig, RefinerConfig
from gnvc_jax.training import stages
from gnvc_jax.training.checkpoints import Checkpoints
from gnvc_jax.training.config import DataConfig, Experiment, InitConfig, RunConfig
from gnvc_jax.training.stages import make_stage
from gnvc_jax.training.stages.codec import CodecLoss
from gnvc_jax.training.stages.latent import LatentLoss
from gnvc_jax.training.stages.vae import VAELoss
from gnvc_jax.training.state import init_state
from gnvc_jax.vae import VAEConfig

VAE = VAEConfig(4, (1, 1, 1), 1, 4, (True, True), patch=2, linear=True)
DIT = DiTConfig(16, 16, 2, 2, 8, 4, text_length=0, context_every=1, context_channels=4)
# What a run would measure of its clips; refiners see later latents doubled.
STATISTICS = {
    "mean": np.zeros(4, np.float32),
    "std": np.ones(4, np.float32),
    "white": np.float32([[1.0] * 4, [2.0] * 4]),
}


def make_vae(tiny_codec, folder):
    """A run of the stage `vae` and its experiment, which has a codec for the stages after it."""
    experiment = Experiment(
        stage="vae",
        vae=VAE,
        codec=tiny_codec,
        loss=VAELoss(lpips=0.0),
        data=DataConfig(frames=5, size=(64, 64), batch=2),
        run=RunConfig(out=str(folder / "vae")),
    )
    save_start(experiment)
    return experiment


def make_base(tiny_codec, folder):
    """An experiment of the stage `latent`, and runs of `vae` and `codec` that it starts from."""
    experiment = make_vae(tiny_codec, folder)
    codec = dataclasses.replace(
        experiment,
        stage="codec",
        init=InitConfig(vae=str(folder / "vae")),
        loss=CodecLoss(),
        run=RunConfig(out=str(folder / "codec")),
    )
    save_start(codec)
    return dataclasses.replace(
        codec,
        stage="latent",
        refiner=RefinerConfig(DIT, tiny_codec.width, 2, 1, deviation=0.3),
        train=("refiner/",),
        loss=LatentLoss(),
        init=InitConfig(run=codec.run.out),
        run=RunConfig(out=str(folder / "latent")),
    )


def drawn(stage, seed=0):
    """Parameters of a stage at random; initialising them would take longer to compile."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: stages.init_trained(stage, key), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32), shapes)


def save_start(experiment, change=lambda params: params):
    """A checkpoint with random parameters, as a run of no steps would leave."""
    params = change(drawn(make_stage(experiment)))
    checkpoints = Checkpoints(experiment)
    state = init_state(experiment.optim, params, jax.random.key(0))
    checkpoints.save(1, state, {}, STATISTICS)
    checkpoints.close()
    return params


def batch():
    return np.random.default_rng(0).integers(0, 256, (2, 5, 64, 64, 3), np.uint8)


def started(experiment):
    stage = make_stage(experiment)
    params = stages.start(stage, drawn(stage, 1), STATISTICS)
    return stage, params, stages.frozen(stage, STATISTICS)


def as_codec(base, **changes):
    """The experiment that the codec's run was made with."""
    init = InitConfig(vae=str(Path(base.init.run).parent / "vae"))
    return dataclasses.replace(base, stage="codec", init=init, loss=CodecLoss(), **changes)


def codec_of(base):
    """The parameters in the codec's run."""
    return drawn(make_stage(as_codec(base)))["codec"]
