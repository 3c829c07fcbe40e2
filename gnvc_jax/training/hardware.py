"""Settings that depend on the hardware: one table for all experiments.

An experiment says what is trained and how: model, loss, data, batch, optimizer. How that is spread
over devices and how they compute follows from the machine, and is one row of `HARDWARE`. `fit`
applies a row before settings from the command line, so that these still have the last word:

    gnvc train --config small/codec --hardware gpu --compute.remat none
"""

import dataclasses
from typing import Literal

from gnvc_jax.parallel import MeshConfig
from gnvc_jax.training.config import Experiment


@dataclasses.dataclass(frozen=True)
class Hardware:
    """How experiments run on one kind of machine.

    Attributes:
        mesh: Number of devices along each axis of the mesh.
        clips: Number of clips that a device works on at a time. The batch is split into as many
            micro-batches as that takes (`optim.accumulate`).
        dtype: Type that the DiT computes in; see `gnvc_jax.training.config.ComputeConfig`.
        remat: Activations that the DiT's backward pass computes again; see there, too.
    """

    mesh: MeshConfig
    clips: int
    dtype: Literal["float32", "bfloat16"]
    remat: Literal["none", "attention"]


HARDWARE = {
    "laptop": Hardware(MeshConfig(), clips=8, dtype="float32", remat="none"),
    "gpu": Hardware(MeshConfig(), clips=16, dtype="bfloat16", remat="attention"),
    "pod": Hardware(MeshConfig(fsdp=16), clips=8, dtype="bfloat16", remat="attention"),
}


def fit(experiment: Experiment, hardware: Hardware, devices: int) -> Experiment:
    """Fits an experiment to a machine.

    The batch is rounded up to whole clips per device and micro-batch and otherwise stays as it is.
    It thus only grows where there are more devices than clips, and the learning rate does not grow.
    Attention is left to the kernel that is best on the backend.

    Args:
        experiment: Experiment.
        hardware: Row of `HARDWARE`.
        devices: Number of devices.

    Returns:
        The experiment with another mesh, batch, accumulation, type and remat.
    """
    mesh = hardware.mesh
    # Clips per shard, the fewest micro-batches of at most `clips` each, and these filled equally,
    # each rounded up.
    shards = max(1, devices // (mesh.context * mesh.tensor))  # devices that clips are divided among
    per_shard = -(-experiment.data.batch // shards)
    accumulate = -(-per_shard // hardware.clips)
    batch = shards * accumulate * -(-per_shard // accumulate)
    compute = dataclasses.replace(
        experiment.compute, dtype=hardware.dtype, remat=hardware.remat, attention=None
    )
    return dataclasses.replace(
        experiment,
        mesh=mesh,
        compute=compute,
        data=dataclasses.replace(experiment.data, batch=batch),
        optim=dataclasses.replace(experiment.optim, accumulate=accumulate),
    )
