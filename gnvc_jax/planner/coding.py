"""Cost of coding on a pod: the programs of encoder and decoder, compiled.

`plan_coding` compiles what runs between the first and the last latent of a group, with each frame
sharded over all devices, as `gnvc encode --devices` does it.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gnvc_jax.arrays import Tree
from gnvc_jax.bitstream.tables import Tables
from gnvc_jax.codec.entropy import LatentSymbols
from gnvc_jax.decoder import check_columns
from gnvc_jax.errors import UsageError
from gnvc_jax.model import Model, stored_dtype
from gnvc_jax.parallel import MeshConfig, make_mesh
from gnvc_jax.parallel.rules import activation_spec
from gnvc_jax.planner import flops
from gnvc_jax.planner.chips import Chip, parse_topology, topology_devices
from gnvc_jax.planner.program import bytes_per_device, memory, mesh_text, roofline, too_large
from gnvc_jax.programs import codec_programs
from gnvc_jax.refiner.attention import exchanged_heads
from gnvc_jax.refiner.model import window_starts
from gnvc_jax.training.config import Experiment
from gnvc_jax.training.networks import init_networks, make_networks

# Programs that run for each latent after the first, by command and whether the codec has motion.
PROGRAMS = {
    ("encode", False): ("encode_video", "analyse", "reconstruct"),
    ("encode", True): ("encode_video", "predict", "analyse", "reconstruct", "compensate"),
    ("decode", False): ("reconstruct", "decode_latents"),
    ("decode", True): ("predict", "reconstruct", "compensate"),
}


def plan_coding(experiment: Experiment, topology: str, command: str, steps: int = 1) -> dict:
    """Predicts the cost of coding groups of `data.frames` frames of `data.size` on a topology.

    Args:
        experiment: Experiment whose model codes.
        topology: Topology such as "v5p:4x4x4".
        command: "encode" or "decode".
        steps: Refinement steps when decoding; ignored without a refiner.

    Raises:
        UsageError: If sizes do not divide, the topology is unknown, or libtpu is not installed.
    """
    chip, _, slices = parse_topology(topology)
    if slices > 1:
        raise UsageError(f"topology {topology!r}: a frame is coded within one slice")
    if chip.is_gpu:
        raise UsageError(f"topology {topology!r}: coding is planned for TPUs only")
    devices = topology_devices(topology)
    return {"topology": topology} | coding_for(experiment, devices, chip, command, steps)


def coding_for(
    experiment: Experiment, devices: Sequence[jax.Device], chip: Chip, command: str, steps: int = 1
) -> dict:
    """Does what `plan_coding` does for given devices, with the peak figures of `chip`.

    "programs" of the result are those between the first and the last latent of a group, each with
    the number of times that it runs per group. Not included are the entropy coder and the search
    for motion on the host, the transfers from and to it, and the programs for the first latent,
    which do less.
    """
    # As in the coder, the columns of a frame are sharded over all devices: `context` has them all.
    data, refiner = experiment.data, experiment.refiner
    steps = steps if command == "decode" and refiner is not None else 0
    # Frames of a group become one latent and another one for each stride of frames.
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
    if experiment.codec is None:
        raise UsageError(f"an experiment of the stage `{experiment.stage}` has no codec to plan")
    times = program_times(experiment, command, latents, steps)
    params = stored_shapes(experiment)
    loaded = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))  # a model, whole
    with jax.set_mesh(mesh):
        check_columns(data.size[1], experiment.vae.stride)
        programs = coding_programs(experiment, params, latents)
        for name, count in times.items():
            function, inputs = programs[name]
            if name == "velocity" and refiner is not None:  # attention kernels cannot be counted
                heads = exchanged_heads(refiner.dit.heads, len(devices))
                t, h, w = inputs[1].shape[1:4]
                work = refiner.dit.flops(t, h, w, heads)
            else:
                work = flops.count(function, *inputs)
            one = planned(function, inputs, work / len(devices), chip, loaded)
            found["programs"][name] = {"times": count, "flops": work} | one
    found["fits"] = all(one["fits"] for one in found["programs"].values())
    if found["fits"]:
        # The same bounds as for training, see `planner.training.cost`, added up over the group.
        seconds = [(one["times"], one["roofline_s"].values()) for one in found["programs"].values()]
        best = sum(count * max(each) for count, each in seconds)
        worst = sum(count * sum(each) for count, each in seconds)
        found["frames_per_s"] = [data.frames / worst, data.frames / best]
    return found


def program_times(
    experiment: Experiment, command: str, latents: int, steps: int = 0
) -> dict[str, int]:
    """Programs that code a group, and how often each runs.

    Each runs once per latent of a group, the refiner once per step and window. The first latent
    counts as another.

    Args:
        experiment: Experiment with a codec, and with a refiner if there are steps.
        command: "encode" or "decode".
        latents: Latents per group.
        steps: Refinement steps.
    """
    codec, refiner = experiment.codec, experiment.refiner
    motion = codec is not None and codec.motion is not None
    times = dict.fromkeys(PROGRAMS[command, motion], latents)
    if steps and refiner is not None:
        times["velocity"] = steps * len(window_starts(latents, refiner.window, refiner.overlap))
        if motion:
            times["add_latent"] = latents
    return times


def stored_shapes(experiment: Experiment) -> Tree:
    """Shapes of the parameters of a model, in the types in which coders hold them in memory."""
    networks = make_networks(experiment)
    params = jax.eval_shape(lambda key: init_networks(networks, key), jax.random.key(0))
    if experiment.refiner is not None:
        params["refiner"] = jax.tree_util.tree_map_with_path(
            lambda path, x: jax.ShapeDtypeStruct(x.shape, stored_dtype(path)), params["refiner"]
        )
    return params


def coding_programs(
    experiment: Experiment, params: Tree, latents: int
) -> dict[str, tuple[Callable, tuple[Tree, ...]]]:
    """Programs of a model by name, see `gnvc_jax.programs.CodecPrograms`, and their arguments.

    Arguments are shapes with shardings on the current mesh.

    Args:
        experiment: Experiment with a codec.
        params: Shapes of the parameters by part.
        latents: Latents per group.
    """
    mesh = jax.sharding.get_mesh()
    vae, codec, refiner = experiment.vae, experiment.codec, experiment.refiner
    assert codec is not None
    zeros, text = np.zeros(vae.latent_channels, np.float32), None
    if refiner is not None and refiner.dit.text_length:
        text = np.zeros((1, refiner.dit.text_length, refiner.dit.text_width), np.float32)
    # The functions of a model need its sizes only: parameters and tables are passed to them.
    no_tables = cast(Tables, None)
    used = codec_programs(
        Model("", vae, codec, {}, {}, zeros, zeros, ({}, {}), no_tables, 0, refiner, None, text)
    )

    # Two placements: the same on all devices, and columns shared out. Frames and latents end in
    # (..., width, channels), so columns are the last dimension but one.
    def whole(tree: Tree) -> Tree:
        place = NamedSharding(mesh, P())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    def columns(tree: Tree) -> Tree:
        def one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            place = activation_spec(mesh, x.shape, context=len(x.shape) - 2)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, place))

        return jax.tree.map(one, tree)

    def array(*shape: int, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    # Shapes follow the data through the model: from frames to latents, symbols and decoded latents,
    # each by tracing the program before.
    q_index, (height, width) = whole(array(1, dtype=jnp.int32)), experiment.data.size
    params = {part: whole(shapes) for part, shapes in params.items()}
    first, frames = (whole(array(1, count, height, width, 3)) for count in (1, vae.temporal_stride))
    # The first latent leaves the states (caches) that programs of later latents take.
    latent, encoder = jax.eval_shape(used.encode_video, params["vae"], None, first)
    _, decoder = jax.eval_shape(used.decode_latents, params["vae"], None, latent)
    one = columns(jax.tree.map(lambda x: array(1, *x.shape[2:]), latent))
    integers = jax.eval_shape(used.analyse, params["codec"], one, None, q_index, None)
    integers = whole(LatentSymbols(*integers[:3]))
    decoded, state = jax.eval_shape(
        used.reconstruct, params["codec"], integers, None, q_index, None
    )
    state, prediction = columns(state), columns(decoded.latent) if codec.motion else None
    programs: dict[str, tuple[Callable, tuple[Tree, ...]]] = {
        "encode_video": (used.encode_video, (params["vae"], columns(encoder), frames)),
        "analyse": (used.analyse, (params["codec"], one, state, q_index, prediction)),
        "reconstruct": (used.reconstruct, (params["codec"], integers, state, q_index, prediction)),
        "decode_latents": (used.decode_latents, (params["vae"], columns(decoder), columns(latent))),
    }
    if codec.motion:
        shown = columns(array(1, 4, height, width, 3, dtype=jnp.uint8))
        reference = columns(array(1, height, width, 3, dtype=jnp.uint8))
        vectors = whole(array(1, 4, height // 16, width // 16, 2, dtype=jnp.int16))
        inter, _ = jax.eval_shape(
            used.reconstruct, params["codec"], integers, state, q_index, prediction
        )
        inputs = params["vae"], columns(inter), prediction, columns(array(*shown.shape))
        programs["predict"] = used.predict, (params["vae"], reference, vectors)
        programs["compensate"] = used.compensate, inputs
        add_later = jax.jit(lambda vae, frames, latent: used.add_latent(vae, frames, latent, False))
        programs["add_latent"] = add_later, (params["vae"], shown, columns(inter.latent))
    if used.velocity is not None and refiner is not None:
        size = min(latents, refiner.window)
        group, features = (columns(array(1, size, *x.shape[1:])) for x in decoded[:2])
        levels = whole(array(1, size, dtype=jnp.int32))
        inputs = group, whole(array(1)), group, features, levels
        programs["velocity"] = used.velocity, (params["refiner"], *inputs)
    return programs


def planned(
    function: Any, arguments: tuple[Tree, ...], operations: float, chip: Chip, loaded: int
) -> dict:
    """Compiles a jitted function and reads its memory and its cost on each device.

    Args:
        function: Jitted function of parameters and other arguments.
        arguments: Shapes with shardings.
        operations: Operations per device.
        chip: Figures of the chip.
        loaded: Bytes of the parameters of the whole model, which are in memory in any case.
    """
    lowered, start = function.lower(*arguments), time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return {"fits": False} | too_large(str(error), lowered.as_text(), arguments)
    found = {"compile_s": round(time.perf_counter() - start, 1)}
    # A coder holds the whole model, of which the first argument is a part; the rest comes on top.
    there = loaded + bytes_per_device(arguments[1:])
    found |= memory(compiled, chip.memory // chip.devices, there)
    return found | roofline(compiled.as_text(), operations, chip)


def coding_report(found: dict) -> str:
    """Describes a plan of coding in words."""
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
            f"  frames/s     at most {low:.3g} if nothing overlaps, {high:.3g} if everything does"
        )
    return "\n".join(lines)
