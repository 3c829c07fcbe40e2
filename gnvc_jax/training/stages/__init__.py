"""Training stages: what is trained, on what, against which loss."""

import functools
import importlib
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils

from gnvc_jax.data.index import ClipIndex
from gnvc_jax.data.left_out import LeftOut
from gnvc_jax.errors import UsageError
from gnvc_jax.parallel import shardings
from gnvc_jax.training.config import Experiment

Tree = Any

# Resolved on first use, so that one stage does not import the networks of the others.
STAGES = {
    "vae": "gnvc_jax.training.stages.vae:VAEStage",
    "transform": "gnvc_jax.training.stages.transform:TransformStage",
    "codec": "gnvc_jax.training.stages.codec:CodecStage",
    "latent": "gnvc_jax.training.stages.latent:LatentStage",
    "pixel": "gnvc_jax.training.stages.pixel:PixelStage",
    "distill": "gnvc_jax.training.stages.pixel:DistillStage",
}


class Stage:
    """What the training loop asks of a stage; subclasses define `init` and `loss`.

    trip_count: of a loop in the loss whose length is drawn in each step, on average.
    """

    trip_count = 1.0

    def __init__(self, experiment: Experiment):
        self.experiment = experiment

    def init(self, key: jax.Array) -> Tree:
        """Trainable parameters, from a random key; traced, so nothing is read from disk here."""
        raise NotImplementedError

    def loss(
        self, params: Tree, frozen: Tree, batch: Tree, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Scalar loss and a flat dict of scalar metrics. key: new in each step; step: int32."""
        raise NotImplementedError

    def warm_start(self, params: Tree) -> Tree:
        """What a new run starts from: the averaged weights of `init_from`, or `params` as is."""
        from gnvc_jax.training.checkpoints import load_params

        start = self.experiment.init_from
        return params if start is None else load_params(start, like=params)

    def measure(self) -> dict[str, np.ndarray]:
        """What a run learns of its data once, at its start, beside parameters."""
        return {}

    @functools.cached_property
    def statistics(self) -> dict[str, np.ndarray]:
        """What `measure` gave when the run began.

        The training loop and `release` set it from the checkpoint of a run that exists, so that
        neither resuming nor other data change what the parameters were trained with.
        """
        return agreed(self.measure())

    def frozen(self) -> Tree:
        """Arrays that `loss` needs and that are not trained."""
        return {}

    def frozen_shapes(self) -> Tree:
        """`frozen` as shapes, from the configuration alone: nothing need be there yet."""
        return {}

    def batch_shapes(self, frames: int) -> Tree:
        """A batch of all processes as shapes; frames: per clip."""
        data = self.experiment.data
        return jax.ShapeDtypeStruct((data.batch, frames, *data.size, 3), np.uint8)

    @functools.cached_property
    def left_out(self) -> LeftOut:
        """What this process could not read of the data, also kept in the run folder."""
        file = Path(self.experiment.run.out) / f"left_out-{jax.process_index()}.jsonl"
        return LeftOut(self.experiment.data.max_left_out, file)

    @functools.cached_property
    def index(self) -> ClipIndex:
        """The videos, looked at once for all data sets of the run."""
        data = self.experiment.data
        return ClipIndex(data.path, data.decode_cache, self.left_out)

    def dataset(self, frames: int | None = None, motion: bool = False) -> grain.IterDataset:
        """Batches without end: uint8 video (b, t, h, w, 3) of this process, in a fixed order.

        frames: t, by default `data.frames`; motion: see `gnvc_jax.data.clips.clip_dataset`.
        """
        from gnvc_jax.data.clips import clip_dataset

        data = self.experiment.data
        return clip_dataset(
            self.index,
            frames=frames or data.frames,
            size=data.size,
            batch=data.batch // jax.process_count(),
            seed=data.seed,
            num_workers=data.workers,
            downscale_prob=data.downscale_prob,
            motion=motion,
            shard=(jax.process_index(), jax.process_count()),
        )


def agreed(tree: Tree) -> Tree:
    """Host arrays of the first process, on all processes of a run.

    Each process reads its own part of the data, so what they measure differs.
    """
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def on_mesh(shapes: Tree) -> Tree:
    """Shapes of parameters with their shardings on the mesh in use; as they are without one.

    What is read into these, each process reads its own part of.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return shapes
    return jax.tree.map(lambda x, s: x.update(sharding=s), shapes, shardings(shapes, mesh))


def placed_like(old: Tree, new: Tree) -> Tree:
    """The arrays `new` on the devices, and in the shardings, of `old`."""
    return jax.tree.map(lambda old, new: jax.device_put(new, old.sharding), old, new)


def make_stage(experiment: Experiment) -> Stage:
    """The stage that the experiment names; UsageError if there is none of that name."""
    module, _, name = STAGES.get(experiment.stage, experiment.stage).partition(":")
    if not name:
        raise UsageError(f"unknown stage {experiment.stage!r}; there are: {', '.join(STAGES)}")
    return getattr(importlib.import_module(module), name)(experiment)
