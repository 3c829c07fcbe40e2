"""Scaling experiments: one train step on several numbers of chips, measured and planned.

`sized` gives the experiment for a number of chips, `measure` trains it for a few steps where there
are as many devices, and `planned` compiles it. `gnvc_jax.planner.scaling_report` puts the points
side by side. A point is a JSON-ready dictionary.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Literal

import jax

from gnvc_jax.errors import UsageError
from gnvc_jax.planner import training
from gnvc_jax.planner.chips import CHIPS, KINDS, compact_topology
from gnvc_jax.planner.efficiency import seconds_at_peak
from gnvc_jax.training import loop
from gnvc_jax.training.config import EvaluationConfig, Experiment
from gnvc_jax.training.stages import make_stage

Axis = Literal["weak", "strong"]

# Figures of a run's log that a point keeps, where the log has them.
MEASURED = (
    *("step_s", "samples_per_s", "tokens_per_s", "gflop_per_s"),
    *("mfu", "goodput", "data_wait", "device_gib"),
)


def sized(
    experiment: Experiment, chips: int, least: int, axis: Axis, per_chip: int = 1
) -> Experiment:
    """Fits mesh and batch of an experiment to a number of chips.

    The mesh axis data takes what the other axes leave.

    Args:
        experiment: Experiment, whose batch is meant for the smallest number of chips.
        chips: Number of chips.
        least: The smallest number of chips.
        axis: "weak" keeps the clips per chip, "strong" the batch.
        per_chip: Number of devices per chip.

    Raises:
        UsageError: If the mesh does not divide the devices, or the batch does not grow by a whole
            factor.
    """
    mesh, data, devices = experiment.mesh, experiment.data, chips * per_chip
    others = mesh.fsdp * mesh.context * mesh.tensor
    if devices % others:
        raise UsageError(
            f"{devices} devices: must be a multiple of fsdp x context x tensor = {others}"
        )
    if axis == "weak":
        if data.batch * chips % least:
            raise UsageError(
                f"data.batch: {data.batch} clips on {least} chips give no whole number on {chips}"
            )
        data = dataclasses.replace(data, batch=data.batch * chips // least)
    mesh = dataclasses.replace(mesh, data=devices // others)
    return dataclasses.replace(experiment, mesh=mesh, data=data)


def devices_per_chip() -> int:
    """Number of JAX devices per chip that is there."""
    kind = KINDS.get(jax.devices()[0].device_kind)
    # Of the chips with two cores, those of a v4 are one device where the chip is real.
    return 1 if kind is None or kind == "v4" else CHIPS[kind].devices


def can_measure(devices: int) -> bool:
    """Whether a step can run on so many of the devices that are there."""
    # Several processes must all take part; a single one may leave devices idle.
    there = jax.device_count()
    return devices <= there if jax.process_count() == 1 else devices == there


def measure(experiment: Experiment, folder: Path, steps: int) -> dict:
    """Trains for a while, and measures the steady state.

    It is a run like any other, with its own data and starting weights, in a folder that is removed
    afterwards. The first `steps` steps are not measured, the next `steps` are.

    Args:
        experiment: Experiment of a size that `sized` gave.
        folder: Folder of the run.
        steps: Number of steps to measure.

    Returns:
        The kind of device, the seconds of a step, and the figures of MEASURED that the log has.

    Raises:
        UsageError: If the run was stopped.
    """
    total = 2 * steps
    run = dataclasses.replace(
        experiment.run,
        out=str(folder),
        log_every=steps,
        checkpoint_every=total,
        keep_every=0,
        tensorboard=False,
        profile=None,
    )
    experiment = dataclasses.replace(
        experiment,
        run=run,
        optim=dataclasses.replace(experiment.optim, steps=total),
        evaluate=EvaluationConfig(),
    )
    if loop.train(make_stage(experiment)) is None:
        raise UsageError("stopped; the same command continues")
    if jax.process_index():
        return {}
    # With log_every = steps there are two lines; the first one holds the warm-up.
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    shutil.rmtree(folder)
    figures = {name: line[name] for name in MEASURED if name in line}
    return {"device": jax.devices()[0].device_kind, "steps": steps} | figures


def planned(experiment: Experiment, chip: str, chips: int, there: bool) -> dict:
    """Plans a point, and adds the seconds of its resources at peak, if it fits.

    Args:
        experiment: Experiment of a size that `sized` gave.
        chip: Name of the chip whose figures count, see `gnvc_jax.planner.chips.CHIPS`.
        chips: Number of chips.
        there: Whether to compile for the devices that are there instead of for the chip.

    Raises:
        UsageError: If sizes do not divide, there is no such topology, or libtpu is not installed.
    """
    if there:
        devices = jax.devices()[: chips * devices_per_chip()]
        found = training.plan_for(experiment, devices, CHIPS[chip])
        found |= {"topology": f"{chips} x {devices[0].device_kind}"}
    else:
        found = training.plan(experiment, compact_topology(chip, chips))
    seconds = {"seconds_at_peak": seconds_at_peak(found)} if "step_s" in found else {}
    return found | seconds


def same_chip(point: dict, chip: str) -> bool:
    """Whether a point was measured on the chip that plans are for."""
    return "measured" in point and KINDS.get(point["measured"]["device"]) == chip
