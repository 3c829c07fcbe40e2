"""What a step has to do, and how much of a run's time goes into steps."""

import dataclasses
import time

import jax

from gnvc_jax.parallel import MeshConfig, make_mesh
from gnvc_jax.planner import flops
from gnvc_jax.planner.chips import PEAK_FLOPS
from gnvc_jax.training import stages
from gnvc_jax.training.stages import Stage


def operations(stage: Stage, device: jax.Device, frames: int, remat: bool = False) -> float:
    """Operations of a step over all devices, forward and backward; see `gnvc_jax.planner.flops`.

    frames: per clip; remat: whether what the backward pass computes again counts twice (False: the
    number that MFU refers to).
    """
    compute = dataclasses.replace(stage.experiment.compute, attention="xla")
    compute = compute if remat else compute.without_remat()
    stage = stages.make_stage(dataclasses.replace(stage.experiment, compute=compute))
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = jax.ShapeDtypeStruct((), "int32")
    params = jax.eval_shape(lambda key: stages.init_trained(stage, key), key)
    arguments = params, stages.frozen_shapes(stage), stage.data.shapes(frames)
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
    """What a step of a stage has to do."""

    def __init__(self, stage: Stage):
        self.stage, self.known = stage, {}

    def of(self, frames: int) -> dict[str, float]:
        """Amounts for clips of so many frames: "frames" and, with a refiner, "tokens" of all clips.

        "peak_s": seconds its operations would take all devices at the published peak, where that is
        known; over the seconds it took, this is the MFU (PaLM, Chowdhery et al. 2022, appendix B).
        """
        if frames not in self.known:
            experiment, devices = self.stage.experiment, jax.devices()
            batch = experiment.data.batch
            found = {"frames": float(batch * frames)}
            if tokens := experiment.tokens(frames):
                found["tokens"] = float(batch * tokens)
            if peak := PEAK_FLOPS.get(devices[0].device_kind):
                needed = operations(self.stage, devices[0], frames)
                found["peak_s"] = needed / (peak * jax.sharding.get_mesh().size)
            self.known[frames] = found
        return self.known[frames]


class Clock:
    """Goodput: the share of the time since a run first started that went into steps that count.

    What else takes time: starting, compiling, saving, standing still, and steps that were lost
    because they came after the checkpoint from which the run went on. (Waiting for input has a
    metric of its own.)

    started: Unix time of the first start; trained_s: seconds of steps up to the checkpoint that the
    run goes on from. `get_state` gives both.
    """

    def __init__(self, started: float, trained_s: float = 0.0):
        self.started, self.trained, self.since = started, trained_s, None

    def run(self) -> None:
        """From here on, time counts."""
        self.since = time.time()

    def trained_s(self) -> float:
        """Seconds of steps."""
        return self.trained + (0.0 if self.since is None else time.time() - self.since)

    def stop(self) -> None:
        """From here on, time does not count."""
        self.trained, self.since = self.trained_s(), None

    def goodput(self) -> float:
        """The share, 0 to 1."""
        return self.trained_s() / max(time.time() - self.started, 1e-9)

    def get_state(self) -> dict[str, float]:
        """What the clock of a resumed run is made of; JSON-ready."""
        return {"started": self.started, "trained_s": self.trained_s()}


def device_memory() -> dict[str, float]:
    """Largest use of a device of this process so far, in GiB; empty where it is not known."""
    found = [d.memory_stats() or {} for d in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] / 2**30 for stats in found if "peak_bytes_in_use" in stats]
    return {"device_gib": max(peaks)} if peaks else {}
