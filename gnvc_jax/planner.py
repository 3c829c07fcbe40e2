"""What training and coding cost on a pod, from the compiled programs and without the pod.

The train step of an experiment, or the programs that coding a video consists of, are compiled ahead
of time for devices that are not there; memory, communication and memory traffic are read from the
programs, operations are counted before. Nothing is loaded, all arrays are shapes.
"""

import dataclasses
import math
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gnvc_jax.codec.entropy import Integers
from gnvc_jax.coder import check_columns
from gnvc_jax.model import Model, Programs, programs, refiner_dtype
from gnvc_jax.parallel import MeshConfig, flops, hlo, make_mesh, shardings
from gnvc_jax.parallel.chips import Chip, parse_topology, topology_devices
from gnvc_jax.parallel.rules import BATCH, activation_spec
from gnvc_jax.refiner.model import windows
from gnvc_jax.training.config import Experiment
from gnvc_jax.training.loop import abstract_state, jit_step
from gnvc_jax.training.stages import Stage, make_stage
from gnvc_jax.training.stages.codec import CodecStage
from gnvc_jax.training.work import operations

Tree = Any


def plan(experiment: Experiment, topology: str, clips: int = 1_000_000) -> dict:
    """Cost of the experiment's train step, its longest clips, on a topology ("v5p:4x4x4").

    clips: of an epoch. Raises ValueError for sizes that do not fit, and without libtpu.
    """
    chip, _ = parse_topology(topology)
    devices = topology_devices(topology)
    return {"topology": topology} | plan_for(experiment, devices, chip, clips)


def plan_for(
    experiment: Experiment, devices: Sequence[jax.Device], chip: Chip, clips: int = 1_000_000
) -> dict:
    """`plan` for given devices, whose figures are those of `chip`."""
    stage = make_stage(experiment)
    mesh = make_mesh(experiment.mesh, devices)
    data = experiment.data
    pieces = mesh.shape["data"] * mesh.shape["fsdp"] * experiment.optim.accumulate
    if data.batch % pieces:
        raise ValueError(f"data.batch {data.batch} does not divide by {pieces} parts")
    frames = max([data.frames, *(frames for _, frames in data.longer)])
    arguments = abstract_arguments(experiment, stage, mesh, frames)
    step = jit_step(experiment, stage, mesh, *arguments[:2])
    found = {
        "experiment": f"{experiment.stage}, {data.batch} clips of {frames} x "
        f"{data.size[0]} x {data.size[1]}",
        "batch": data.batch,
        "mesh": dict(mesh.shape),
        "devices": len(devices),
        "chips": len(devices) // chip.devices,
        "parameters": parameters(arguments[0], arguments[1]),
        "argument_bytes": sum(map(bytes_per_device, arguments)),
        "hbm_bytes": chip.memory // chip.devices,
        "flops": {
            "model": operations(stage, devices[0], frames),
            "computed": operations(stage, devices[0], frames, experiment.compute.remat),
        },
    }
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = step.lower(*arguments)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return found | {"fits": False} | too_large(str(error), lowered.as_text(), arguments)
    found["compile_s"] = round(time.perf_counter() - start, 1)
    return (
        found
        | memory(compiled, found["hbm_bytes"])
        | cost(found, compiled.as_text(), stage, chip, frames, clips)
    )


def plan_coding(experiment: Experiment, topology: str, command: str, steps: int = 1) -> dict:
    """Cost of coding groups of `data.frames` frames of `data.size` on a topology.

    command: "encode" or "decode"; steps: of refinement when decoding, 0 without a refiner. All
    devices share each frame, as `gnvc encode --devices` has it. Raises ValueError as `plan`.
    """
    chip, _ = parse_topology(topology)
    devices = topology_devices(topology)
    return {"topology": topology} | coding_for(experiment, devices, chip, command, steps)


def coding_for(
    experiment: Experiment, devices: Sequence[jax.Device], chip: Chip, command: str, steps: int = 1
) -> dict:
    """`plan_coding` for given devices, whose figures are those of `chip`.

    "programs" are those between the first and the last latent of a group, each with the times that
    it runs in a group; the host's entropy coder, two copies of integers and the first latent's
    programs, which do less, are left out.
    """
    data, refiner = experiment.data, experiment.refiner
    steps = steps if command == "decode" and refiner is not None else 0
    latents = 1 + (data.frames - 1) // experiment.vae.temporal_stride
    mesh = make_mesh(MeshConfig(data=1, context=len(devices)), devices)
    found = {
        "command": command,
        "experiment": f"{command}, groups of {data.frames} frames of {data.size[0]} x "
        f"{data.size[1]}" + (f", {steps} steps of refinement" if steps else ""),
        "mesh": dict(mesh.shape),
        "devices": len(devices),
        "chips": len(devices) // chip.devices,
        "hbm_bytes": chip.memory // chip.devices,
        "programs": {},
    }
    times = dict.fromkeys(("encode_video", "analyse", "reconstruct"), latents)
    if command == "decode":
        times = dict.fromkeys(("reconstruct", "decode_latents"), latents)
    if steps:
        times["velocity"] = steps * len(windows(latents, refiner.window, refiner.overlap))
    stage = make_stage(experiment)
    if not isinstance(stage, CodecStage):
        raise ValueError(f"an experiment of the stage `{experiment.stage}` has no codec to plan")
    trained = jax.eval_shape(stage.init, jax.random.key(0))
    params = jax.eval_shape(stage.model_parts, trained, stage.frozen_shapes())
    if refiner is not None:
        params["refiner"] = jax.tree_util.tree_map_with_path(
            lambda path, x: jax.ShapeDtypeStruct(x.shape, refiner_dtype(path)), params["refiner"]
        )
    loaded = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))  # a model, whole
    with jax.set_mesh(mesh):
        check_columns(data.size[1])
        used, arguments = coding_programs(experiment, params, latents)
        for name, count in times.items():
            function, inputs = getattr(used, name), arguments[name]
            if name == "velocity":  # kernels of attention cannot be counted
                work = refiner.dit.flops(*inputs[1].shape[1:4])
            else:
                work = flops.count(function, *inputs)
            one = program(function, inputs, work / len(devices), chip, loaded)
            found["programs"][name] = {"times": count, "flops": work} | one
    found["fits"] = all(one["fits"] for one in found["programs"].values())
    if found["fits"]:
        seconds = [(one["times"], one["roofline_s"].values()) for one in found["programs"].values()]
        best = sum(count * max(each) for count, each in seconds)
        worst = sum(count * sum(each) for count, each in seconds)
        found["frames_per_s"] = [data.frames / worst, data.frames / best]
    return found


def coding_programs(
    experiment: Experiment, params: Tree, latents: int
) -> tuple[Programs, dict[str, tuple[Tree, ...]]]:
    """Programs of a model, and their arguments, for the mesh in use, as shapes with shardings.

    params: shapes of those of all parts; latents: of a group.
    """
    mesh = jax.sharding.get_mesh()
    vae, codec, refiner = experiment.vae, experiment.codec, experiment.refiner
    zeros, text = np.zeros(vae.latent_channels, np.float32), None
    if refiner is not None and refiner.dit.text_length:
        text = np.zeros((1, refiner.dit.text_length, refiner.dit.text_width), np.float32)
    used = programs(
        Model("", vae, codec, {}, {}, zeros, zeros, ({}, {}), None, refiner, None, text)
    )

    def whole(tree):
        place = NamedSharding(mesh, P())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    def columns(tree):
        def one(x):
            place = activation_spec(mesh, x.shape, context=len(x.shape) - 2)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, place))

        return jax.tree.map(one, tree)

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    q_index, (height, width) = whole(array(1, dtype=jnp.int32)), experiment.data.size
    params = {part: whole(shapes) for part, shapes in params.items()}
    first, frames = (whole(array(1, count, height, width, 3)) for count in (1, 4))
    latent, encoder = jax.eval_shape(used.encode_video, params["vae"], None, first)
    _, decoder = jax.eval_shape(used.decode_latents, params["vae"], None, latent)
    one = columns(jax.tree.map(lambda x: array(1, *x.shape[2:]), latent))
    integers = jax.eval_shape(used.analyse, params["codec"], one, None, q_index)
    integers = whole(Integers(*integers[:3]))
    decoded, state = jax.eval_shape(used.reconstruct, params["codec"], integers, None, q_index)
    state = columns(state)
    arguments = {
        "encode_video": (params["vae"], columns(encoder), frames),
        "analyse": (params["codec"], one, state, q_index),
        "reconstruct": (params["codec"], integers, state, q_index),
        "decode_latents": (params["vae"], columns(decoder), columns(latent)),
    }
    if refiner is not None:
        size = min(latents, refiner.window)
        group, features = (columns(array(1, size, *x.shape[1:])) for x in (decoded, state.memory))
        inputs = group, whole(array(1)), group, features, q_index
        arguments["velocity"] = params["refiner"], *inputs
    return used, arguments


def program(
    function: Any, arguments: tuple[Tree, ...], operations: float, chip: Chip, loaded: int
) -> dict:
    """Memory and cost of a jitted function of parameters and more, on each device of a mesh.

    loaded: bytes of the whole model's parameters.
    """
    lowered, start = function.lower(*arguments), time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return {"fits": False} | too_large(str(error), lowered.as_text(), arguments)
    found = {"compile_s": round(time.perf_counter() - start, 1)}
    there = loaded + bytes_per_device(arguments[1:])
    found |= memory(compiled, chip.memory // chip.devices, there)
    return found | roofline(compiled.as_text(), operations, chip)


def sweep(
    experiment: Experiment,
    topologies: Sequence[str],
    per_device: int | None = None,
    clips: int = 1_000_000,
) -> Iterator[dict]:
    """A plan for each topology in turn.

    per_device: clips per device along data x fsdp in place of `data.batch`: the batch grows with
    the pod (weak scaling), else it stays (strong scaling). Raises ValueError as `plan`.
    """
    for topology in topologies:
        here = experiment
        if per_device is not None:
            chip, sizes = parse_topology(topology)
            mesh = experiment.mesh
            batch = per_device * math.prod(sizes) * chip.devices // (mesh.context * mesh.tensor)
            here = dataclasses.replace(
                experiment, data=dataclasses.replace(experiment.data, batch=batch)
            )
        yield plan(here, topology, clips)


def report(found: dict) -> str:
    """A plan in words."""
    gib = 2**30
    lines = [
        f"{found['topology']}: {found['experiment']}; {mesh_text(found)}",
        f"  parameters   {found['parameters']['trained']:,} trained, "
        f"{found['parameters']['frozen']:,} frozen",
        f"  arguments    {found['argument_bytes'] / gib:.2f} GiB per device of "
        f"{found['hbm_bytes'] / gib:.0f}",
    ]
    if "peak_bytes" not in found:
        lines += [f"  DOES NOT FIT {found['reason']}"]
        return "\n".join(lines + [f"    {x}" for x in found["largest"]])
    low, high = found["step_s"]
    epoch = found["chip_hours_per_epoch"]
    lines += [
        f"  temporaries  {found['temp_bytes'] / gib:.2f} GiB; peak {found['peak_bytes'] / gib:.2f}"
        + ("" if found["fits"] else ", DOES NOT FIT"),
        f"  operations   {found['flops']['model']:.3g} per step, "
        f"{found['flops']['computed']:.3g} with what is computed again",
        *(
            f"  {x['kind']:19}{x['count']:6.0f} times, {x['sent'] / gib:.3f} GiB sent per device"
            for x in found["collectives"]
        ),
        "  at peak      " + ", ".join(f"{k} {v:.4f} s" for k, v in found["roofline_s"].items()),
        f"  step         {low:.4f} s if all overlaps, {high:.4f} s if nothing does",
        f"  MFU          at most {found['mfu_bound']:.0%}",
        f"  {found['clips_per_epoch']:,} clips: {epoch[0]:.3g} to {epoch[1]:.3g} chip hours",
    ]
    return "\n".join(lines)


def coding_report(found: dict) -> str:
    """A plan of coding in words."""
    gib = 2**30
    lines = [f"{found['topology']}: {found['experiment']}; {mesh_text(found)}"]
    for name, one in found["programs"].items():
        if "peak_bytes" not in one:
            lines += [
                f"  {name}: DOES NOT FIT {one['reason']}",
                *(f"    {x}" for x in one["largest"]),
            ]
            continue
        sent = sum(x["sent"] for x in one["collectives"]) / gib
        low, high = max(one["roofline_s"].values()), sum(one["roofline_s"].values())
        lines.append(
            f"  {name:15}{one['times']:4} times {low:.4f} to {high:.4f} s, {one['flops']:.3g} "
            f"operations, peak {one['peak_bytes'] / gib:.2f} of {found['hbm_bytes'] / gib:.0f} GiB"
            f"{'' if one['fits'] else ' DOES NOT FIT'}, {sent:.3f} GiB sent per device"
        )
    if found["fits"]:
        low, high = found["frames_per_s"]
        lines.append(
            f"  frames/s     at most {low:.3g} if nothing overlaps, {high:.3g} if all does"
        )
    return "\n".join(lines)


def mesh_text(found: dict) -> str:
    """The mesh of a plan in words."""
    return ", ".join(f"{k} {v}" for k, v in found["mesh"].items() if v > 1) or "one device"


def table(plans: Sequence[dict]) -> str:
    """Plans side by side, as a table in Markdown."""
    rows = [
        "| topology | mesh | batch | peak GiB | step s | MFU at most | clips/s | chip hours |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in plans:
        start = f"| {one['topology']} | {mesh_text(one)} | {one['batch']} | "
        if "peak_bytes" not in one:
            rows.append(start + "does not fit | | | | |")
            continue
        (low, high), hours = one["step_s"], one["chip_hours_per_epoch"]
        rows.append(
            f"{start}{one['peak_bytes'] / 2**30:.1f}{'' if one['fits'] else ' (too much)'} | "
            f"{low:.3f}–{high:.3f} | {one['mfu_bound']:.0%} | "
            f"{one['clips_per_s'][0]:.0f}–{one['clips_per_s'][1]:.0f} | "
            f"{hours[0]:,.0f}–{hours[1]:,.0f} |"
        )
    return "\n".join(rows)


def abstract_arguments(
    experiment: Experiment, stage: Stage, mesh: Mesh, frames: int
) -> tuple[Tree, ...]:
    """(state, frozen, batch) of the train step as shapes with shardings."""

    def placed(tree, places):
        def one(x, place):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

        return jax.tree.map(one, tree, places)

    state = abstract_state(experiment, stage, mesh)
    frozen = stage.frozen_shapes()
    batch = stage.batch_shapes(frames)
    over_batch = jax.tree.map(lambda _: NamedSharding(mesh, P(BATCH)), batch)
    return state, placed(frozen, shardings(frozen, mesh)), placed(batch, over_batch)


def bytes_per_device(tree: Tree) -> int:
    """Bytes of a tree of shapes with shardings on each device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def parameters(state: Tree, frozen: Tree) -> dict[str, int]:
    """Numbers that train and that do not, without what stands only in the optimiser."""
    trees = {"trained": state.params, "frozen": frozen}
    return {k: sum(math.prod(x.shape) for x in jax.tree.leaves(t)) for k, t in trees.items()}


def memory(compiled: Any, available: int, arguments: int | None = None) -> dict:
    """A device's memory in bytes; arguments: what lies there before, by default what is used."""
    stats = compiled.memory_analysis()
    arguments = stats.argument_size_in_bytes if arguments is None else arguments
    total = (
        arguments
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    return {
        "argument_bytes": arguments,
        "temp_bytes": stats.temp_size_in_bytes,
        "peak_bytes": total,
        "fits": total <= available,
    }


def cost(found: dict, text: str, stage: Stage, chip: Chip, frames: int, clips: int) -> dict:
    """Communication and time of a step: resources at their peaks, in turn or all at once."""
    experiment, devices = stage.experiment, found["devices"]
    per_device = found["flops"]["computed"] / devices
    resources = roofline(text, per_device, chip, stage.turns)
    seconds = resources["roofline_s"].values()
    best, worst = max(seconds), sum(seconds)
    rate = {
        "step_s": [best, worst],
        "mfu_bound": found["flops"]["model"] / devices / (chip.flops / chip.devices) / best,
        "clips_per_s": [experiment.data.batch / worst, experiment.data.batch / best],
        "chip_hours_per_epoch": [
            clips / experiment.data.batch * s * found["chips"] / 3600 for s in (best, worst)
        ],
        "clips_per_epoch": clips,
    }
    if tokens := experiment.tokens(frames):
        rate["tokens_per_clip"] = tokens
        rate["tokens_per_s"] = [tokens * x for x in rate["clips_per_s"]]
    return resources | rate


def roofline(text: str, operations: float, chip: Chip, turns: float = 1.0) -> dict:
    """Communication of a compiled program, and seconds of each resource at its peak.

    operations: of one device. A collective runs in a ring along one axis of the torus, both ways.
    """
    sent, moved = hlo.collectives(text, turns), hlo.traffic(text, turns)
    return {
        "collectives": [dataclasses.asdict(one) for one in sent],
        "hbm_traffic_bytes": moved,
        "roofline_s": {
            "compute": operations / (chip.flops / chip.devices),
            "hbm": moved / (chip.bandwidth / chip.devices),
            "ici": sum(one.sent for one in sent) / (2 * chip.link / chip.devices),
        },
    }


def too_large(message: str, text: str, arguments: tuple[Tree, ...]) -> dict:
    """What is known of a program that the compiler gave up on: the figure and the largest tensors.

    text: the program before it was divided, so that tensors count for all devices, but for those
    inside attention. Raises RuntimeError with the message if it speaks of anything but memory.
    """
    reason = message.splitlines()[0]
    if "RESOURCE_EXHAUSTED" not in reason:
        raise RuntimeError(reason)
    tensors = {
        (
            math.prod(map(int, dims.split("x"))) * int(width) // 8,
            f"{dims.replace('x', ' x ')} {kind}",
        )
        for dims, kind, width in re.findall(r"tensor<((?:\d+x)*\d+)x([a-z]+(\d+))>", text)
    }
    named = [
        (bytes_per_device(x), jax.tree_util.keystr(path, simple=True, separator="/"))
        for path, x in jax.tree_util.tree_leaves_with_path(arguments)
    ]

    def largest(sizes, what):
        return [
            f"{size / 2**20:,.0f} MiB {what} {x}" for size, x in sorted(sizes, reverse=True)[:5]
        ]

    return {
        "reason": reason.partition("RESOURCE_EXHAUSTED: ")[2],
        "largest": largest(tensors, "on all devices:") + largest(named, "per device:"),
    }
