"""Throughput of training: the work of a step, and the share of a run's time that goes into steps.

`WorkPerStep` counts clips, frames, tokens and operations; divided by the time they take, they are
the rates and the MFU in the log. `Clock` measures goodput.
"""

import dataclasses
import time

import jax

from gnvc_jax.parallel import MeshConfig, make_mesh
from gnvc_jax.planner import flops
from gnvc_jax.planner.chips import PEAK_FLOPS
from gnvc_jax.training import stages
from gnvc_jax.training.config import ClipShape
from gnvc_jax.training.stages import Stage


def operations(stage: Stage, device: jax.Device, shape: ClipShape, remat: bool = False) -> float:
    """Counts the operations of a step over all devices, forward and backward.

    See `gnvc_jax.planner.flops` for what counts.

    Args:
        stage: Stage that is trained.
        device: One of the devices: layers take the form that suits its platform.
        shape: Shape of the clips.
        remat: Whether operations that the backward pass repeats count twice. False gives the number
            that MFU refers to.
    """
    experiment = stage.experiment
    compute = experiment.compute if remat else experiment.compute.without_remat()
    # Attention by matrix products has the same number of operations and can be counted.
    if experiment.refiner is not None:  # kernels cannot be counted
        compute = dataclasses.replace(compute, attention="xla")
    if compute != experiment.compute:
        stage = stages.make_stage(dataclasses.replace(experiment, compute=compute))
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = jax.ShapeDtypeStruct((), "int32")
    params = jax.eval_shape(lambda key: stages.init_trained(stage, key), key)
    arguments = params, stages.frozen_shapes(stage), stage.data.shapes(shape)
    mesh = make_mesh(MeshConfig(data=1), [device])  # the platform's layers, undivided
    with jax.set_mesh(mesh):
        return flops.count(
            jax.value_and_grad(stages.objective(stage), has_aux=True),
            *arguments,
            key,
            step,
            trip_count=stage.trip_count,
        )


class WorkPerStep:
    """Amount of work in a step of a stage."""

    def __init__(self, stage: Stage):
        self.stage, self.known = stage, {}

    def of(self, shape: ClipShape) -> dict[str, float]:
        """Amounts for clips of a shape, over all devices; the first call traces the step.

        Returns:
            "clips", "frames" and, with a refiner, "tokens"; "gflop", the operations in 10^9, where
            nothing counts twice that is computed again; "peak_s", the seconds that these would take
            at the published peak of the devices, where that is known. "peak_s" over the seconds
            that the step took is the MFU (PaLM, Chowdhery et al. 2022, appendix B).
        """
        if shape not in self.known:
            experiment, devices = self.stage.experiment, jax.devices()
            batch = experiment.data.batch
            found = {"clips": float(batch), "frames": float(batch * shape.frames)}
            if tokens := experiment.tokens(shape):
                found["tokens"] = float(batch * tokens)
            # Without rematerialisation: MFU counts what the model needs, not what the machine
            # repeats.
            needed = operations(self.stage, devices[0], shape)
            found["gflop"] = needed / 1e9
            if peak := PEAK_FLOPS.get(devices[0].device_kind):
                found["peak_s"] = needed / (peak * jax.sharding.get_mesh().size)
            self.known[shape] = found
        return self.known[shape]


class Clock:
    """Goodput: the share of the time since a run first started that went into steps that count.

    The rest of the time goes into starting, compiling, saving, standing still, and steps that were
    lost because they came after the checkpoint from which the run went on. (Waiting for input has a
    metric of its own.)

    Args:
        started: Unix time of the first start.
        trained_s: Seconds of steps up to the checkpoint that the run goes on from. `get_state`
            gives both.
    """

    def __init__(self, started: float, trained_s: float = 0.0):
        self.started, self.trained, self.since = started, trained_s, None

    def run(self) -> None:
        """Starts the clock: from here on, time counts."""
        self.since = time.time()

    def trained_s(self) -> float:
        """Seconds that went into steps."""
        return self.trained + (0.0 if self.since is None else time.time() - self.since)

    def stop(self) -> None:
        """Stops the clock: from here on, time does not count."""
        trained = self.trained_s()
        # In this order, so that another thread never counts the same time twice.
        self.since, self.trained = None, trained

    def goodput(self) -> float:
        """Share of the time that went into steps, 0 to 1."""
        return self.trained_s() / max(time.time() - self.started, 1e-9)

    def get_state(self) -> dict[str, float]:
        """Returns the arguments of the clock of a resumed run, JSON-ready."""
        return {"started": self.started, "trained_s": self.trained_s()}


def device_memory() -> dict[str, float]:
    """Largest use of a device of this process so far, in GiB; empty where it is not known."""
    found = [d.memory_stats() or {} for d in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] / 2**30 for stats in found if "peak_bytes_in_use" in stats]
    return {"device_gib": max(peaks)} if peaks else {}
