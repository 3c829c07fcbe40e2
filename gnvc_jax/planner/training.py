"""Cost of a train step on a pod: the step itself, compiled for devices that are not attached.

`plan` compiles for one topology; `report` describes a plan in words, `table` puts several side by
side. A plan is a JSON-ready dictionary.
"""

import dataclasses
import math
import time
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gnvc_jax.arrays import Tree
from gnvc_jax.errors import UsageError
from gnvc_jax.parallel import make_mesh, shardings
from gnvc_jax.parallel.rules import BATCH
from gnvc_jax.planner import gpus
from gnvc_jax.planner.chips import Chip, device_count, parse_topology, topology_devices
from gnvc_jax.planner.program import bytes_per_device, memory, mesh_text, roofline, too_large
from gnvc_jax.refiner.attention import RING, exchanged_heads
from gnvc_jax.training.config import ClipShape, Experiment
from gnvc_jax.training.stages import Stage, frozen_shapes, make_stage
from gnvc_jax.training.state import abstract_state
from gnvc_jax.training.step import jit_step
from gnvc_jax.training.throughput import operations


def plan(
    experiment: Experiment, topology: str, clips: int = 1_000_000, per_device: int | None = None
) -> dict:
    """Predicts the cost of an experiment's train step on a topology.

    Args:
        experiment: Experiment; of its shapes of clips, the largest is planned.
        topology: Topology such as "v5p:4x4x4".
        clips: Number of clips per epoch.
        per_device: Number of clips per device along the axes data and fsdp, overriding
            `data.batch`, so that the batch grows with the pod (weak scaling). If None, the batch
            stays the same (strong scaling).

    Raises:
        UsageError: If sizes do not divide, the topology is unknown, or libtpu or JAX's CUDA plugin
            is not installed.
    """
    chip = parse_topology(topology).chip
    if per_device is not None:
        mesh = experiment.mesh
        # Devices along context and tensor share clips, so they do not make the batch larger.
        batch = per_device * device_count(topology) // (mesh.context * mesh.tensor)
        data = dataclasses.replace(experiment.data, batch=batch)
        experiment = dataclasses.replace(experiment, data=data)
    devices = topology_devices(topology)
    return {"topology": topology} | plan_for(experiment, devices, chip, clips)


def plan_for(
    experiment: Experiment, devices: Sequence[jax.Device], chip: Chip, clips: int = 1_000_000
) -> dict:
    """Does what `plan` does for given devices, with the peak figures of `chip`."""
    # Without a GPU, cuDNN's attention cannot be compiled; another kernel stands for it.
    abstract_gpus = devices[0].platform == "gpu" and devices[0] not in jax.devices()
    if abstract_gpus and experiment.compute.attention is None:
        compute = dataclasses.replace(experiment.compute, attention=gpus.ATTENTION)
        experiment = dataclasses.replace(experiment, compute=compute)
    stage = make_stage(experiment)
    mesh = make_mesh(experiment.mesh, devices)
    data = experiment.data
    # Every device along data and fsdp gets the same number of clips, in each accumulated piece.
    pieces = mesh.shape["data"] * mesh.shape["fsdp"] * experiment.optim.accumulate
    if data.batch % pieces:
        raise UsageError(f"data.batch must be a multiple of {pieces}, got {data.batch}")
    shape = data.largest
    arguments = abstract_arguments(stage, mesh, shape)
    step = jit_step(stage, mesh, *arguments[:2])
    found = {
        "experiment": f"{experiment.stage}, {data.batch} clips of "
        f"{shape.frames} x {shape.height} x {shape.width}",
        "batch": data.batch,
        "mesh": dict(mesh.shape),
        "devices": len(devices),
        "chips": len(devices) // chip.devices,
        "parameters": parameters(arguments[0], arguments[1]),
        "argument_bytes": sum(map(bytes_per_device, arguments)),
        "hbm_bytes": chip.memory // chip.devices,
        "networks": chip.networks,
        "flops": {
            "model": operations(stage, devices[0], shape),
            "computed": operations(stage, devices[0], shape, remat=True)
            + operations_on_padding(stage, mesh, shape),
        },
    }
    if abstract_gpus:
        # Each machine of a topology counts as a process: what crosses them goes over InfiniBand.
        found["machines"] = len({one.process_index for one in devices})
        found["note"] = gpus.NOTE
    options = gpus.COMPILER_OPTIONS if abstract_gpus else None
    start = time.perf_counter()
    # Lowering traces the very step that training runs, with shapes in place of arrays.
    with jax.set_mesh(mesh):
        lowered = step.lower(*arguments)
        try:
            # The compiler assigns memory, so it is also the one that says what does not fit.
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            return found | {"fits": False} | too_large(str(error), lowered.as_text(), arguments)
    found["compile_s"] = round(time.perf_counter() - start, 1)
    return (
        found
        | memory(compiled, found["hbm_bytes"])
        | cost(found, compiled.as_text() or "", stage, chip, shape, clips)
    )


def operations_on_padding(stage: Stage, mesh: Mesh, shape: ClipShape) -> float:
    """Counts operations on heads of zeros, over all devices.

    They fill up the DiT's heads where the devices along context, which exchange tokens for heads,
    do not divide these. `operations` counts a step as one device would compute it, without them.
    """
    experiment = stage.experiment
    refiner, context = experiment.refiner, mesh.shape["context"]
    if refiner is None or experiment.compute.attention == RING:
        return 0.0
    tensor, dit = mesh.shape["tensor"], refiner.dit
    filled = exchanged_heads(dit.heads // tensor, context)
    if filled is None:  # keys travel around a ring
        return 0.0
    # Training refines a window of each clip, see `gnvc_jax.training.refinement.random_window`.
    latents, h, w = experiment.latents(shape)
    size = min(refiner.window, max(1, latents - 1)), h, w
    zeros = dit.flops(*size, filled * tensor) - dit.flops(*size)
    # Forward once and backward twice, and forward again where the backward pass keeps nothing.
    passes = 3.0 + (experiment.compute.remat == "full")
    if stage.trip_count != 1.0:  # steps of refinement without a gradient; 1 stands for no such loop
        passes += stage.trip_count
    return experiment.data.batch * passes * zeros


def report(found: dict) -> str:
    """Describes a plan in words."""
    gib = 2**30
    lines = [
        f"{found['topology']}: {found['experiment']}; {mesh_text(found)}",
        f"  parameters   {found['parameters']['trained']:,} trained, "
        f"{found['parameters']['frozen']:,} frozen",
        f"  arguments    {found['argument_bytes'] / gib:.2f} GiB per device of "
        f"{found['hbm_bytes'] / gib:.0f}",
    ]
    # The compiler gave up, so there is neither a peak nor a program to take times from.
    if "peak_bytes" not in found:
        lines += [f"  DOES NOT FIT {found['reason']}"]
        return "\n".join(lines + [f"    {x}" for x in found["largest"]])
    low, high = found["step_s"]
    epoch = found["chip_hours_per_epoch"]
    lines += [
        f"  temporaries  {found['temp_bytes'] / gib:.2f} GiB; peak {found['peak_bytes'] / gib:.2f}"
        + ("" if found["fits"] else ", DOES NOT FIT"),
        f"  operations   {found['flops']['model']:.3g} per step, "
        f"{found['flops']['computed']:.3g} including rematerialisation",
        *(
            f"  {x['kind']:19}{x['count']:6.0f} times, {x['sent'] / gib:.3f} GiB sent per device "
            f"over {found['networks'][x['network']]}"
            for x in found["collectives"]
        ),
        "  at peak      " + ", ".join(f"{k} {v:.4f} s" for k, v in found["roofline_s"].items()),
        f"  step         {low:.4f} s if everything overlaps, {high:.4f} s if nothing does",
        f"  MFU          at most {found['mfu_bound']:.0%}",
        f"  {found['clips_per_epoch']:,} clips: {epoch[0]:.3g} to {epoch[1]:.3g} chip hours",
        *([f"  {found['note']}"] if "note" in found else []),
    ]
    return "\n".join(lines)


def table(plans: Sequence[dict]) -> str:
    """Puts plans side by side in a Markdown table."""
    rows = [
        "| topology | mesh | batch | peak GiB | GiB over ICI | GiB over DCN | step s | MFU at most "
        "| clips/s | chip hours |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in plans:
        start = f"| {one['topology']} | {mesh_text(one)} | {one['batch']} | "
        if "peak_bytes" not in one:
            rows.append(start + "does not fit | | | | | | |")
            continue
        (low, high), hours = one["step_s"], one["chip_hours_per_epoch"]
        sent = {
            network: sum(x["sent"] for x in one["collectives"] if x["network"] == network) / 2**30
            for network in ("ici", "dcn")
        }
        rows.append(
            f"{start}{one['peak_bytes'] / 2**30:.1f}{'' if one['fits'] else ' (too much)'} | "
            f"{sent['ici']:.2f} | {sent['dcn']:.2f} | "
            f"{low:.3f}–{high:.3f} | {one['mfu_bound']:.0%} | "
            f"{one['clips_per_s'][0]:.0f}–{one['clips_per_s'][1]:.0f} | "
            f"{hours[0]:,.0f}–{hours[1]:,.0f} |"
        )
    return "\n".join(rows)


def abstract_arguments(stage: Stage, mesh: Mesh, shape: ClipShape) -> tuple[Tree, ...]:
    """Describes the arguments (state, frozen, batch) of the train step by shapes with shardings."""

    def placed(tree: Tree, places: Tree) -> Tree:
        def one(x: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

        return jax.tree.map(one, tree, places)

    # Nothing is allocated: a pod's model is planned on a laptop.
    state = abstract_state(stage, mesh)
    frozen = frozen_shapes(stage)
    batch = stage.data.shapes(shape)
    over_batch = jax.tree.map(lambda _: NamedSharding(mesh, P(BATCH)), batch)
    return state, placed(frozen, shardings(frozen, mesh)), placed(batch, over_batch)


def parameters(state: Tree, frozen: Tree) -> dict[str, int]:
    """Counts of trained and frozen parameters, without optimizer moments and averages."""
    trees = {"trained": state.params, "frozen": frozen}
    return {k: sum(math.prod(x.shape) for x in jax.tree.leaves(t)) for k, t in trees.items()}


def cost(found: dict, text: str, stage: Stage, chip: Chip, shape: ClipShape, clips: int) -> dict:
    """Estimates communication and time of a step.

    The time lies between that of the slowest resource at its peak (if everything overlaps) and the
    sum over the resources (if nothing does).
    """
    experiment, devices = stage.experiment, found["devices"]
    # Time follows from all operations, rematerialised ones included; MFU counts only what the model
    # needs.
    per_device = found["flops"]["computed"] / devices
    per_node = devices // found["machines"] if "machines" in found else None
    resources = roofline(text, per_device, chip, stage.trip_count, per_node)
    seconds = resources["roofline_s"].values()
    best, worst = max(seconds), sum(seconds)
    rate = {
        "step_s": [best, worst],
        # Useful operations over what a device could do in the shortest possible step.
        "mfu_bound": found["flops"]["model"] / devices / (chip.flops / chip.devices) / best,
        "clips_per_s": [experiment.data.batch / worst, experiment.data.batch / best],
        "chip_hours_per_epoch": [
            clips / experiment.data.batch * s * found["chips"] / 3600 for s in (best, worst)
        ],
        "clips_per_epoch": clips,
    }
    if tokens := experiment.tokens(shape):
        rate["tokens_per_clip"] = tokens
        rate["tokens_per_s"] = [tokens * x for x in rate["clips_per_s"]]
    return resources | rate
