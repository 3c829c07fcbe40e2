"""Table that a run prints before its first step: parameters, their places, kernels, sizes, memory.

    latent on 8 x TPU v5p: fsdp 8
    part     state    parameters  type        MiB  per device  on the mesh
    codec    trained  15,871,680  float32    60.5        60.5  replicated
    ...
    step     8 clips of 5 frames of 256 x 256: 40 frames, 4,096 tokens
    kernels  convolutions by XLA; attention splash; refiner in bfloat16, ...
    memory   2,500.1 MiB per device (trained 414.0, averages 414.0, ...), and activations

All of it is read from shapes and shardings; nothing is compiled for it.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax

from gnvc_jax import convolution
from gnvc_jax.arrays import Tree
from gnvc_jax.planner.program import bytes_per_device
from gnvc_jax.refiner import attention
from gnvc_jax.training.config import ClipShape, Experiment
from gnvc_jax.training.state import State

MIB = 2**20
COLUMNS = ("part", "state", "parameters", "type", "MiB", "per device", "on the mesh")


def describe_run(experiment: Experiment, state: State, frozen: Tree, shape: ClipShape) -> str:
    """Writes the table of a run; to be called under its mesh.

    Args:
        experiment: Experiment of the run.
        state: Train state, arrays or shapes, with shardings.
        frozen: Arrays or shapes that do not train, see `gnvc_jax.training.stages.frozen`.
        shape: Shape of the clips of the next step.
    """
    mesh = jax.sharding.get_mesh()
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    device = mesh.devices.flat[0].device_kind
    return "\n".join(
        [
            f"{experiment.stage} on {mesh.size} x {device}" + (f": {axes}" if axes else ""),
            *aligned([COLUMNS, *parameter_rows(state, frozen)]),
            f"step     {step_text(experiment, shape)}",
            f"kernels  {kernels_text(experiment)}",
            f"memory   {memory_text(state, frozen)}",
        ]
    )


def parameter_rows(state: State, frozen: Tree) -> list[tuple[str, ...]]:
    """Rows of all parts that train or do not, and of the constants of the loss."""
    # The parts of "fixed" are rows of their own; "constants" and "teacher" are one row each.
    fixed = {name: part for name, part in frozen.items() if name != "fixed"}
    groups = (("trained", state.params), ("frozen", frozen["fixed"] | fixed))
    return [
        parameter_row(name, how, jax.tree.leaves(part))
        for how, parts in groups
        for name, part in parts.items()
        if jax.tree.leaves(part)
    ]


def parameter_row(name: str, how: str, leaves: list[jax.Array]) -> tuple[str, ...]:
    """Cells of one row of the table, see COLUMNS."""
    types = sorted({str(x.dtype) for x in leaves})
    total, here = sum(map(nbytes, leaves)), bytes_per_device(leaves)
    return (
        name,
        how,
        f"{sum(x.size for x in leaves):,}",
        ", ".join(types),
        f"{total / MIB:,.1f}",
        f"{here / MIB:,.1f}",
        placement(leaves),
    )


def placement(leaves: list[Any]) -> str:
    """Says in words how arrays lie on the mesh; the percentage is of their bytes."""
    # Split: a device holds less than the whole array.
    split = [x for x in leaves if x.sharding.shard_shape(x.shape) != x.shape]
    if not split:
        return "replicated"
    # A dimension may be split over several axes at once, which are then a tuple.
    axes = set(jax.tree.leaves([tuple(x.sharding.spec) for x in split]))
    sizes = split[0].sharding.mesh.shape
    names = ", ".join(axis for axis in sizes if axis in axes and sizes[axis] > 1)
    return f"{sum(map(nbytes, split)) / sum(map(nbytes, leaves)):.0%} split over {names}"


def step_text(experiment: Experiment, shape: ClipShape) -> str:
    """Says how much goes through one step."""
    data, batch = experiment.data, experiment.data.batch
    clips = f"{batch} clips of {shape.frames} frames of {shape.height} x {shape.width}"
    parts = [f"{batch * shape.frames:,} frames"]
    if tokens := experiment.tokens(shape):
        parts.append(f"{batch * tokens:,} tokens")
    if (accumulate := experiment.optim.accumulate) > 1:
        parts.append(f"in {accumulate} micro-batches")
    text = f"{clips}: {', '.join(parts)}"
    # What must fit in memory in the end, if not at once.
    last = data.largest
    grows = f"; later {last.frames} frames of {last.height} x {last.width}"
    return text + (grows if last.volume > shape.volume else "")


def kernels_text(experiment: Experiment) -> str:
    """Says which forms of convolution and attention are used, and how the refiner computes."""
    by = {convolution.CPU: "Winograd and sums over taps", convolution.DIRECT: "XLA"}
    parts = [f"convolutions by {by[convolution.strategy()]}"]
    if experiment.refiner is not None:
        dit, compute = experiment.refiner.dit, experiment.compute
        name, ring = attention.resolve(
            compute.attention, compute.jax_dtype, dit.heads, dit.width // dit.heads
        )
        parts += [
            f"attention {name}{' in a ring' if ring else ''}",
            f"refiner in {compute.dtype}, precision {compute.precision}, remat {compute.remat}",
        ]
    return "; ".join(parts)


def memory_text(state: State, frozen: Tree) -> str:
    """Says how much memory a device needs throughout a step; activations are not included."""
    # Gradients are as large as the parameters, and there together with everything else.
    params = bytes_per_device(state.params)
    amounts = {
        "trained": params,
        "averages": bytes_per_device(state.ema),
        "moments": bytes_per_device(state.opt_state),
        "gradients": params,
        "frozen": bytes_per_device(frozen),
    }
    parts = ", ".join(f"{name} {amount / MIB:,.1f}" for name, amount in amounts.items() if amount)
    total = sum(amounts.values()) / MIB
    return f"{total:,.1f} MiB per device ({parts}), and activations"


def nbytes(x: jax.Array) -> int:
    """Bytes of an array or of a shape, counted once however many devices hold copies."""
    return math.prod(x.shape) * x.dtype.itemsize


def aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Formats rows as lines with columns of equal width, numbers flush right."""
    columns = list(zip(*rows))
    widths = [max(map(len, column)) for column in columns]
    # The first row is the heading.
    right = [any(cell[:1].isdigit() for cell in column[1:]) for column in columns]
    right[-1] = False  # percentages in words
    return [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right)
        ).rstrip()
        for row in zip(*columns)
    ]
