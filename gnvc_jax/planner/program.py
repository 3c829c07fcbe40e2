"""What one compiled program needs of a device: memory, communication, time at the peaks."""

import dataclasses
import math
import re
from typing import Any

import jax

from gnvc_jax.planner import hlo
from gnvc_jax.planner.chips import Chip

Tree = Any


def bytes_per_device(tree: Tree) -> int:
    """Bytes of a tree of shapes with shardings on each device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


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


def roofline(text: str, operations: float, chip: Chip, trip_count: float = 1.0) -> dict:
    """Communication of a compiled program, and seconds of each resource at its peak.

    operations: of one device. A collective runs in a ring along one axis of the torus, both ways.
    """
    sent, moved = hlo.collectives(text, trip_count), hlo.traffic(text, trip_count)
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


def mesh_text(found: dict) -> str:
    """The mesh of a plan in words."""
    return ", ".join(f"{k} {v}" for k, v in found["mesh"].items() if v > 1) or "one device"
