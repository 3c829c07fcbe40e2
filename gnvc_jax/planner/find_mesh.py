"""Search for the mesh, and for what the backward pass computes again, that train at the least cost.

A full search would compile hundreds of programs of several minutes each. So all meshes of a
topology are put in order by a rough estimate of what they send, and `find_mesh` compiles the best
of them. Each is tried with the kinds of rematerialisation in turn, from the one that computes least
to the one that keeps least, until it fits. What cannot work is named with the reason, without
compiling: sizes that do not divide, or a state that is too large without any activation.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import jax

from gnvc_jax.arrays import Tree
from gnvc_jax.errors import UsageError
from gnvc_jax.parallel import MeshConfig, make_mesh
from gnvc_jax.planner.chips import Chip, parse_topology, topology_devices
from gnvc_jax.planner.program import bytes_per_device, mesh_text
from gnvc_jax.planner.training import abstract_arguments, plan_for
from gnvc_jax.training.config import Experiment
from gnvc_jax.training.stages import frozen_shapes, init_trained, make_stage

# From the least operations to the least memory, see `gnvc_jax.refiner.dit.REMAT`.
REMATS = ("none", "matmuls", "attention", "full")


def find_mesh(
    experiment: Experiment,
    topology: str,
    compilations: int,
    per_device: int | None = None,
    clips: int = 1_000_000,
) -> Iterator[dict]:
    """Plans an experiment's train step on meshes of a topology, the likely best first.

    Args:
        experiment: Experiment; its mesh and `compute.remat` are replaced.
        topology: Topology such as "v5p:4x4x4".
        compilations: Number of programs to compile at most.
        per_device: Clips per device along data and fsdp, overriding `data.batch`.
        clips: Number of clips per epoch.

    Yields:
        Plans, see `gnvc_jax.planner.training.plan`, with "remat"; or for what was not compiled a
        dictionary of "topology", "mesh", "batch", "fits" (False) and "reason".

    Raises:
        UsageError: If the topology is unknown, or libtpu is not installed.
    """
    chip, devices = parse_topology(topology).chip, topology_devices(topology)
    for found in find_mesh_for(experiment, devices, chip, compilations, per_device, clips):
        yield {"topology": topology} | found


def find_mesh_for(
    experiment: Experiment,
    devices: Sequence[jax.Device],
    chip: Chip,
    compilations: int,
    per_device: int | None = None,
    clips: int = 1_000_000,
) -> Iterator[dict]:
    """Does what `find_mesh` does for given devices, with the peak figures of `chip`."""
    # Compilations that may still be spent; what is dropped without one costs nothing.
    left = compilations
    for candidate in candidates(experiment, len(devices), per_device):
        # Neither sizes nor the state depend on what is computed again.
        if (reason := impossible(candidate, devices, chip)) is not None:
            mesh, batch = dataclasses.asdict(candidate.mesh), candidate.data.batch
            yield {"mesh": mesh, "batch": batch, "fits": False, "reason": reason}
            continue
        for remat in REMATS if experiment.refiner is not None else REMATS[:1]:
            compute = dataclasses.replace(candidate.compute, remat=remat)
            one = dataclasses.replace(candidate, compute=compute)
            if left == 0:
                return
            left -= 1
            found = plan_for(one, devices, chip, clips)
            yield found | {"remat": remat}
            if found["fits"]:
                break  # to keep less would cost more


def candidates(
    experiment: Experiment, devices: int, per_device: int | None = None
) -> list[Experiment]:
    """The experiment on every mesh of so many devices, the one that should send least first.

    The axes context and tensor divide the refiner's work; without a refiner they are 1.

    Args:
        experiment: Experiment, whose mesh is replaced.
        devices: Number of devices.
        per_device: Clips per device along data and fsdp; None keeps `data.batch`.
    """
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    found = []
    for fsdp, context, tensor in itertools.product(divisors, repeat=3):
        # The axis data takes what the others leave.
        used = fsdp * context * tensor
        if devices % used or (context * tensor > 1 and experiment.refiner is None):
            continue
        mesh, data = MeshConfig(devices // used, fsdp, context, tensor), experiment.data
        if per_device is not None:
            data = dataclasses.replace(data, batch=per_device * mesh.data * fsdp)
        found.append(dataclasses.replace(experiment, mesh=mesh, data=data))
    # Sent per clip: the batch may differ from mesh to mesh.
    size = state_bytes(experiment)
    return sorted(found, key=lambda one: estimated_bytes(one, *size) / one.data.batch)


def state_bytes(experiment: Experiment) -> tuple[int, int]:
    """Bytes of the trained and of the fixed parameters, of all devices together."""
    stage = make_stage(experiment)
    trained = jax.eval_shape(lambda key: init_trained(stage, key), jax.random.key(0))

    def size(tree: Tree) -> int:
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    return size(trained), size(frozen_shapes(stage))


def estimated_bytes(experiment: Experiment, trained: int, fixed: int) -> float:
    """Bytes that a device sends in a step, roughly: enough to put meshes in order.

    Counted are the gathering of parameters and the reduction of gradients along fsdp, the reduction
    of gradients along data and context, the exchange of tokens for heads along context, and the
    sums of partial results along tensor; all as rings, in which a device sends (n - 1) / n of what
    is gathered ("How to Scale Your Model", jax-ml.github.io/scaling-book, sharded matrices).

    Args:
        experiment: Experiment on one mesh.
        trained: Bytes of the parameters that train, of all devices together.
        fixed: Bytes of the others.
    """
    mesh, dit = experiment.mesh, experiment.refiner and experiment.refiner.dit

    def ring(size: float, devices: int) -> float:
        return size * (devices - 1) / devices

    # Every micro-batch gathers the layers twice, forward and backward, and scatters gradients once.
    micro = experiment.optim.accumulate
    along_fsdp = micro * ring((2 * (trained + fixed) + trained) / mesh.tensor, mesh.fsdp)
    # Gradients are divided as parameters are, so only that share has to be summed elsewhere: over
    # data, whose devices see other clips, and over context, which see other tokens.
    gradients = trained / (mesh.fsdp * mesh.tensor)
    sent = along_fsdp + 2 * ring(gradients, mesh.data * mesh.context)
    if dit is None:
        return sent
    tokens = experiment.tokens(experiment.data.largest) * experiment.data.batch
    # Activations of one layer on a device, in bytes.
    width = experiment.compute.jax_dtype.itemsize * dit.width
    layer = tokens * width / (mesh.data * mesh.fsdp * mesh.context)
    # Queries, keys, values and outputs are exchanged, forward and backward.
    exchanged = 2 * 4 * ring(layer / mesh.tensor, mesh.context)
    # Two sums per block and direction, each a scattering and a gathering.
    summed = 2 * 2 * 2 * ring(layer, mesh.tensor)
    return sent + dit.layers * (exchanged + summed)


def impossible(experiment: Experiment, devices: Sequence[jax.Device], chip: Chip) -> str | None:
    """Why an experiment cannot train on its mesh, as far as that shows without compiling."""
    mesh, batch, refiner = experiment.mesh, experiment.data.batch, experiment.refiner
    pieces = mesh.data * mesh.fsdp * experiment.optim.accumulate
    if batch % pieces:
        return f"data.batch {batch} is not a multiple of {pieces}"
    if refiner is not None and refiner.dit.heads % mesh.tensor:
        return f"tensor {mesh.tensor} does not divide {refiner.dit.heads} heads"
    try:
        built = make_mesh(mesh, devices)
        arguments = abstract_arguments(make_stage(experiment), built, experiment.data.largest)
    except UsageError as error:
        return str(error)
    # Activations come on top, but nothing that is computed again can make the state smaller.
    size, there = sum(map(bytes_per_device, arguments)), chip.memory // chip.devices
    if size > there:
        return f"state and batch alone take {size / 2**30:.1f} of {there / 2**30:.0f} GiB"
    return None


def cheapest(plans: Sequence[dict]) -> dict | None:
    """The plan that fits with the most clips per second if nothing overlaps; None if none fits."""
    fitting = [one for one in plans if one["fits"]]
    return max(fitting, key=lambda one: one["clips_per_s"][0], default=None)


def line(found: dict) -> str:
    """Describes one plan of a search in a line."""
    start = f"{found['topology']}: {mesh_text(found)}"
    if "remat" in found:
        start += f", remat {found['remat']}"
    if "clips_per_s" not in found:
        return f"{start}: {found['reason']}"
    fits = "" if found["fits"] else ", DOES NOT FIT"
    peak, (low, high) = found["peak_bytes"] / 2**30, found["clips_per_s"]
    return f"{start}: peak {peak:.1f} GiB{fits}, {low:.1f} to {high:.1f} clips/s"


def summary(plans: Sequence[dict]) -> str:
    """Puts the plans that a search compiled in a table, and names the cheapest."""
    rows = [
        "| mesh | remat | batch | peak GiB | compute s | HBM s | links s | clips/s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in plans:
        if "clips_per_s" not in one:
            continue
        seconds, (low, high) = one["roofline_s"], one["clips_per_s"]
        peak = f"{one['peak_bytes'] / 2**30:.1f}{'' if one['fits'] else ' (too much)'}"
        links = seconds["ici"] + seconds.get("dcn", 0.0)
        times = [f"{x:.3f}" for x in (seconds["compute"], seconds["hbm"], links)]
        cells = [mesh_text(one), one["remat"], str(one["batch"]), peak, *times]
        rows.append(f"| {' | '.join([*cells, f'{low:.1f}–{high:.1f}'])} |")
    best = cheapest(plans)
    if best is None:
        return "\n".join([*rows, "None of these fits."])
    sizes = ",".join(f"{axis}={size}" for axis, size in best["mesh"].items())
    options = f"--mesh {sizes} --data.batch {best['batch']}"
    if best["remat"] != "none":
        options += f" --compute.remat {best['remat']}"
    return "\n".join([*rows, f"The cheapest of these that fits: {options}"])
