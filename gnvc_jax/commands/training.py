"""Commands on experiments: train, release, and plan their cost on a pod."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, Suppress, arg

from gnvc_jax.commands.options import EXIT_PARTIAL, MAX_STEPS, check_range
from gnvc_jax.errors import UsageError

if TYPE_CHECKING:
    from gnvc_jax.training.config import Experiment

Settings = Suppress[Sequence[str]]


def load_experiment(config: str, settings: Sequence[str]) -> "Experiment":
    """Loads an experiment and applies settings such as ("--optim.lr", "1e-3").

    Raises FileNotFoundError for an unknown config and UsageError for wrong values; exits with a
    message for settings that do not exist, and with help for --help.
    """
    from gnvc_jax import shipped_configs
    from gnvc_jax.training import config as configs

    shipped_configs.make_importable()
    return configs.override(configs.load(shipped_configs.find_config(config)), settings)


def train(*, config: str, settings: Settings = ()) -> int:
    """Train one stage of the codec.

    Example: gnvc train --config small/codec --data.path clips --optim.lr 1e-3

    Every setting of the experiment is an option as well; `gnvc train --config NAME --help` lists
    them. The run folder (--run.out) receives the resolved config, metrics and checkpoints. Rerun
    the same command to resume an interrupted run.

    Args:
        config: Name of a shipped config, or path of a config file.
        settings: Settings of the experiment.
    """
    from gnvc_jax.runtime import join_processes
    from gnvc_jax.training import loop
    from gnvc_jax.training.stages import make_stage

    experiment = load_experiment(config, settings)
    join_processes()
    loop.train(make_stage(experiment))
    return 0


def release(run: Positional[str], out: Positional[str], /, *, name: str | None = None) -> int:
    """Write the model file of a training run.

    Example: gnvc release runs/small/codec small.safetensors

    The model has the averaged weights of the newest checkpoint. The run folder says where the
    parameters come from that the run did not train; these folders must still be there.

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
    per_device: int | None = None,
    clips: int = 1_000_000,
    coding: Literal["encode", "decode"] | None = None,
    steps: int = 1,
    out: Annotated[str | None, arg(metavar="FILE")] = None,
    settings: Settings = (),
) -> int:
    """Predict what a training step, or coding, costs on a TPU pod, without the pod.

    Example: gnvc plan --config wan_1_3b/latent --topology v5p:4x4x4 --mesh fsdp=16
    --data.batch 64 --data.latents cache

    Settings of the experiment are options as well, as for `gnvc train`. Nothing that the
    experiment refers to is read. The exit code is 3 if a plan does not fit into memory.

    Args:
        config: Name of a shipped config, or path of a config file.
        topology: One or more topologies, CHIP:AxB[xC].
        per_device: Clips per device along the mesh axes data and fsdp, overriding data.batch.
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
    from gnvc_jax.planner import training as training_planner

    check_range("--steps", steps, 0, MAX_STEPS)
    if not topology:
        raise UsageError("--topology needs at least one CHIP:AxB[xC]")
    if coding and (per_device or any(x.startswith("--mesh") for x in settings)):
        raise UsageError(
            "--mesh and --per-device apply to training; with --coding each frame is sharded over "
            "all devices"
        )
    jax.config.update("jax_platforms", "cpu")  # compiling for TPUs needs none
    experiment = load_experiment(config, settings)
    if coding:
        report = coding_planner.coding_report
        plans = (coding_planner.plan_coding(experiment, one, coding, steps) for one in topology)
    else:
        report = training_planner.report
        plans = training_planner.sweep(experiment, topology, per_device, clips)
    done = []
    for found in plans:
        print(report(found), flush=True)
        done.append(found)
        if out:  # after each, since a large one takes minutes
            write_json(Path(out), done)
    if len(done) > 1 and not coding:
        print(training_planner.table(done))
    return 0 if all(found["fits"] for found in done) else EXIT_PARTIAL
