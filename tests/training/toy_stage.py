"""A linear regression as a training stage: small enough to train in milliseconds."""

import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np

from gnvc_jax.data.clips import endless_batches
from gnvc_jax.training.config import DataConfig, Experiment, OptimConfig, RunConfig
from gnvc_jax.training.inputs import Data
from gnvc_jax.training.stages import Stage

SIZES = {"x": 4, "y": 2}


class Sample(grain.transforms.RandomMap):
    def random_map(self, _: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        x = rng.standard_normal(4, np.float32)
        return {"x": x, "y": x @ np.arange(8, dtype=np.float32).reshape(4, 2) + 1}


def init(key):
    return {"w": jax.random.normal(key, (4, 2)), "b": jnp.zeros(2)}


def loss(params, constants, batch, key, step):
    noise = 0.1 * jax.random.normal(key, batch["y"].shape)
    error = (batch["x"] @ params["w"] + params["b"]) * constants["scale"] - batch["y"] + noise
    return jnp.mean(error**2), {"largest": jnp.max(jnp.abs(error))}


def toy_stage(experiment: Experiment) -> Stage:
    data = experiment.data

    def batches(frames):
        count = jax.process_count()
        shard = jax.process_index(), count
        return endless_batches(32, Sample(), batch=data.batch // count, seed=data.seed, shard=shard)

    def shapes(frames):
        shape = jax.ShapeDtypeStruct
        return {name: shape((data.batch, size), jnp.float32) for name, size in SIZES.items()}

    return Stage(
        experiment,
        init,
        loss,
        Data(batches, shapes),
        constants=lambda statistics: {"scale": jnp.float32(1)},
        constant_shapes=lambda: {"scale": jax.ShapeDtypeStruct((), jnp.float32)},
    )


def experiment() -> Experiment:
    return Experiment(
        stage="toy_stage:toy_stage",
        data=DataConfig(batch=8),
        optim=OptimConfig(lr=0.1, warmup=2, steps=4),
        run=RunConfig(log_every=1),
    )


def experiment_in(out, **changes) -> Experiment:
    """The experiment with the run folder `out`, which keeps two checkpoints."""
    base = experiment()
    run = dataclasses.replace(base.run, out=str(out), keep=2)
    return dataclasses.replace(base, run=run, **changes)
