"""Commands on experiments: train, release, plan their cost on a pod, and measure how they scale."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, Suppress, arg

from gnvc_jax.commands.options import (
    EXIT_PARTIAL,
    EXIT_STOPPED,
    MAX_STEPS,
    check_range,
    numbers,
)
from gnvc_jax.errors import UsageError

if TYPE_CHECKING:
    from gnvc_jax.training.config import Experiment

Settings = Suppress[Sequence[str]]
Counts = Annotated[tuple[int, ...], numbers(int, "N,N,...")]
Hardware = Literal["laptop", "gpu", "pod"]  # rows of `gnvc_jax.training.hardware.HARDWARE`


def load_experiment(
    config: str, settings: Sequence[str], hardware: Hardware | None = None, devices: int = 1
) -> "Experiment":
    """Loads an experiment, fits it to hardware, and applies settings.

    Args:
        config: Name of a shipped config, or path of a config file.
        settings: Settings such as ("--optim.lr", "1e-3").
        hardware: Kind of hardware to fit the experiment to; None leaves it as it is.
        devices: Number of devices that there are; of no use without `hardware`.

    Raises:
        FileNotFoundError: If there is no such config.
        UsageError: If a value is wrong.
        SystemExit: After a message for settings that do not exist, and after help for --help.
    """
    from gnvc_jax import shipped_configs
    from gnvc_jax.training import config as configs
    from gnvc_jax.training.hardware import HARDWARE, fit

    shipped_configs.make_importable()
    experiment = configs.load(shipped_configs.find_config(config))
    if hardware is not None:
        experiment = fit(experiment, HARDWARE[hardware], devices)
    return configs.override(experiment, settings)


def train(*, config: str, hardware: Hardware | None = None, settings: Settings = ()) -> int:
    """Train one stage of the codec.

    Example: gnvc train --config small/codec --data.path clips --optim.lr 1e-3

    Every setting of the experiment is an option as well; `gnvc train --config NAME --help` lists
    them. The run folder (--run.out) receives the resolved config, metrics and checkpoints. Rerun
    the same command to resume an interrupted run. The exit code is 75 if SIGINT or SIGTERM ended
    the run early, after a checkpoint.

    Args:
        config: Name of a shipped config, or path of a config file.
        hardware: Kind of hardware to choose mesh, micro-batches, dtype and rematerialisation for;
            by default they are those of the config. Settings of the experiment override it.
        settings: Settings of the experiment.
    """
    import jax

    from gnvc_jax.runtime import join_processes
    from gnvc_jax.training import loop
    from gnvc_jax.training.stages import make_stage

    join_processes()
    devices = jax.device_count() if hardware else 1
    experiment = load_experiment(config, settings, hardware, devices)
    return 0 if loop.train(make_stage(experiment)) is not None else EXIT_STOPPED


def release(run: Positional[str], out: Positional[str], /, *, name: str | None = None) -> int:
    """Write the model file of a training run.

    Example: gnvc release runs/small/codec small.safetensors

    The model has the averaged weights of the newest checkpoint. The run folder has all that it
    takes, but runs of earlier versions need the folders that they started from.

    Args:
        run: Run folder.
        out: Model file to write.
        name: Name of the model, by default that of the file without its suffix.
    """
    from gnvc_jax.training.release import release as release_run

    codec, vae = release_run(run, out, name).fingerprints
    print(f"{out}: codec {codec.hex()[:8]}, VAE {vae.hex()[:8]}")
    return 0


def plan(
    *,
    config: str,
    topology: tuple[str, ...],
    hardware: Hardware | None = None,
    per_device: int | None = None,
    find_mesh: Annotated[int, arg(metavar="N")] = 0,
    clips: int = 1_000_000,
    coding: Literal["encode", "decode"] | None = None,
    steps: int = 1,
    out: Annotated[str | None, arg(metavar="FILE")] = None,
    settings: Settings = (),
) -> int:
    """Predict what a training step, or coding, costs on a TPU pod or on GPUs, without them.

    Example: gnvc plan --config wan_1_3b/latent --topology v5p:4x4x4 --mesh fsdp=16
    --data.batch 64 --data.latents cache

    Settings of the experiment are options as well, as for `gnvc train`. Nothing that the
    experiment refers to is read. The exit code is 3 if a plan does not fit into memory.

    Args:
        config: Name of a shipped config, or path of a config file.
        topology: One or more topologies, CHIP:AxB[xC], or SLICESxCHIP:AxB[xC] for several slices;
            of GPUs, h100:8 for a machine and 4xh100:8 for four.
        hardware: Kind of hardware to choose mesh, micro-batches, dtype and rematerialisation for,
            as for `gnvc train`.
        per_device: Clips per device along the mesh axes data and fsdp, overriding data.batch.
        find_mesh: Search for the cheapest mesh and rematerialisation that fit, by compiling up to N
            combinations; overrides mesh and compute.remat.
        clips: Clips per epoch.
        coding: Plan encoding or decoding instead of training: groups of data.frames frames of
            data.size, with each frame sharded over all devices.
        steps: Number of refinement steps when planning to decode.
        out: JSON file to write the plans to.
        settings: Settings of the experiment.
    """
    import jax

    from gnvc_jax.files import write_json
    from gnvc_jax.planner import coding as coding_planner
    from gnvc_jax.planner import find_mesh as search
    from gnvc_jax.planner import training as training_planner
    from gnvc_jax.planner.chips import device_count

    check_range("--steps", steps, 0, MAX_STEPS)
    if not topology:
        raise UsageError("--topology needs at least one [SLICESx]CHIP:AxB[xC]")
    check_range("--find-mesh", find_mesh, 0, math.inf)
    meshes = any(x.startswith("--mesh") for x in settings)
    if coding and (per_device or find_mesh or meshes):
        raise UsageError(
            "--mesh, --find-mesh and --per-device apply to training; with --coding each frame is "
            "sharded over all devices"
        )
    if find_mesh and meshes:
        raise UsageError("--find-mesh chooses the mesh; leave out --mesh")
    jax.config.update("jax_platforms", "cpu")  # compiling needs no accelerator
    done = []
    for one in topology:
        experiment = load_experiment(config, settings, hardware, device_count(one))
        if coding:
            plans = [coding_planner.plan_coding(experiment, one, coding, steps)]
            report = coding_planner.coding_report
        elif find_mesh:
            plans = search.find_mesh(experiment, one, find_mesh, per_device, clips)
            report = search.line
        else:
            plans = [training_planner.plan(experiment, one, clips, per_device)]
            report = training_planner.report
        for found in plans:  # a search finds them one by one
            print(report(found), flush=True)
            done.append(found)
            if out:  # after each, since a large one takes minutes
                write_json(Path(out), done)
        if find_mesh:
            print(search.summary([found for found in done if found["topology"] == one]))
    if len(topology) > 1 and not (coding or find_mesh):
        print(training_planner.table(done))
    fitting = {found["topology"] for found in done if found["fits"]}
    return 0 if fitting == set(topology) else EXIT_PARTIAL


def scaling(
    *,
    config: str,
    chips: Counts,
    axis: Literal["weak", "strong"],
    measure: bool = False,
    steps: int = 10,
    chip: Literal["v4", "v5e", "v5p", "v6e", "v7x", "h100", "h200", "b200"] = "v5p",
    hardware: Hardware | None = None,
    out: Annotated[str, arg(metavar="FOLDER")] = "scaling",
    settings: Settings = (),
) -> int:
    """Measure and plan a training step on several numbers of chips.

    Example: gnvc scaling --config wan_1_3b/latent --chips 8,64,512,4096 --axis weak --measure
    --data.latents cache --mesh fsdp=8 --data.batch 8

    Settings of the experiment are options as well, as for `gnvc train`. Writes scaling.json,
    scaling.md with the table, and scaling.svg. Points that scaling.json has already are kept: run
    the command on slices of several sizes, with the same folder, to measure all of them. The exit
    code is 3 if a plan does not fit into memory.

    Args:
        config: Name of a shipped config, or path of a config file.
        chips: Numbers of chips.
        axis: "weak" keeps the clips per chip, as data.batch gives them for the smallest number of
            chips; "strong" keeps data.batch.
        measure: Measure where there are enough devices, by short runs of training; the rest is
            planned.
        steps: Number of steps to measure, after as many warm-up steps.
        chip: Kind of chip to plan for.
        hardware: Kind of hardware to choose mesh, micro-batches, dtype and rematerialisation for,
            as for `gnvc train`.
        out: Folder to write to.
        settings: Settings of the experiment.
    """
    import jax

    from gnvc_jax.planner import scaling as points
    from gnvc_jax.planner.chips import CHIPS
    from gnvc_jax.planner.scaling_results import Results
    from gnvc_jax.runtime import join_processes

    check_range("--steps", steps, 2)
    check_range("--chips", min(chips), 1)
    if measure:
        join_processes()
    else:
        jax.config.update("jax_platforms", "cpu")  # compiling needs no accelerator
    counts = sorted(set(chips))
    facts = {"config": config, "settings": [*settings], "axis": axis, "chip": chip}
    facts |= {"least": counts[0], "hardware": hardware}
    results = Results(Path(out), facts)
    for count in counts:
        there = measure and points.can_measure(count * points.devices_per_chip())
        if results.has(count, there):
            continue
        per_chip = points.devices_per_chip() if there else CHIPS[chip].devices
        experiment = load_experiment(config, settings, hardware, counts[0] * per_chip)
        experiment = points.sized(experiment, count, counts[0], axis, per_chip)
        point: dict = {"chips": count}
        if there:
            point["measured"] = points.measure(experiment, Path(out) / f"run-{count}", steps)
        results.add(point | {"plan": points.planned(experiment, chip, count, there)})
    print(results.report())
    return 0 if results.fit_into_memory else EXIT_PARTIAL
