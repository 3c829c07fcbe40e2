"""A linear regression as a training stage: small enough to train in milliseconds."""

import grain
import jax
import jax.numpy as jnp
import numpy as np

from gnvc_jax.training.config import DataConfig, Experiment, OptimConfig, RunConfig
from gnvc_jax.training.stages import Stage


def sample(_: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    x = rng.standard_normal(4, np.float32)
    return {"x": x, "y": x @ np.arange(8, dtype=np.float32).reshape(4, 2) + 1}


class ToyStage(Stage):
    def init(self, key):
        return {"w": jax.random.normal(key, (4, 2)), "b": jnp.zeros(2)}

    def frozen(self):
        return {"scale": jnp.float32(1)}

    def loss(self, params, frozen, batch, key, step):
        noise = 0.1 * jax.random.normal(key, batch["y"].shape)
        error = (batch["x"] @ params["w"] + params["b"]) * frozen["scale"] - batch["y"] + noise
        return jnp.mean(error**2), {"largest": jnp.max(jnp.abs(error))}

    def dataset(self, frames=None):
        data = grain.MapDataset.range(32).seed(self.experiment.data.seed).shuffle().repeat()
        return data.random_map(sample).to_iter_dataset().batch(self.experiment.data.batch)


def experiment() -> Experiment:
    return Experiment(
        stage="toy_stage:ToyStage",
        data=DataConfig(batch=8),
        optim=OptimConfig(lr=0.1, warmup=2, steps=4),
        run=RunConfig(log_every=1),
    )
