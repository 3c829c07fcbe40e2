"""Cost of one compiled program on a device: memory, communication, and time at peak rates.

`memory` reads the compiler's memory analysis, `roofline` divides operations, traffic and
communication by what the chip can do at best, and `too_large` explains a program that the compiler
gave up on.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

import jax

from gnvc_jax.arrays import Tree
from gnvc_jax.planner import hlo
from gnvc_jax.planner.chips import HOP_S, Chip


def bytes_per_device(tree: Tree) -> int:
    """Bytes per device of a tree of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        # Random keys have a type of their own, and take a few bytes.
        if not jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def memory(compiled: Any, available: int, arguments: int | None = None) -> dict:
    """Memory of a device while the program runs, in bytes.

    Args:
        compiled: Compiled program.
        available: Memory of a device.
        arguments: Bytes that are in memory before; if None, the arguments of the program.
    """
    stats = compiled.memory_analysis()
    arguments = stats.argument_size_in_bytes if arguments is None else arguments
    # Donated arguments share memory with outputs ("alias"), which must not count twice.
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


def roofline(
    text: str, operations: float, chip: Chip, trip_count: float = 1.0, per_node: int | None = None
) -> dict:
    """Reads a program's communication, and the seconds that each resource takes at its peak.

    A collective inside of a slice is taken to run in a ring along one axis of the torus, in both
    directions (on GPUs, over all NVLinks), and to take the longer of the times of its bytes and of
    its hops (summed by kind); one between slices takes that of its bytes over the network.

    Args:
        text: HLO text of the program.
        operations: Operations per device.
        chip: Figures of the chip.
        trip_count: Trip count assumed for loops whose length is not known before they run.
        per_node: Devices of one machine, see `gnvc_jax.planner.hlo.collectives`.
    """
    # Peak figures are per chip, and the program is that of a device: a chip may have two.
    sent, moved = hlo.collectives(text, trip_count, per_node), hlo.traffic(text, trip_count)
    seconds = {
        "compute": operations / (chip.flops / chip.devices),
        "hbm": moved / (chip.bandwidth / chip.devices),
    }
    collectives = [dataclasses.asdict(one) | {"seconds": at_peak(one, chip)} for one in sent]
    seconds["ici"] = sum(one["seconds"] for one in collectives if one["network"] == "ici")
    if between := [one["seconds"] for one in collectives if one["network"] == "dcn"]:
        seconds["dcn"] = sum(between)
    return {
        "collectives": collectives,
        "hbm_traffic_bytes": moved,
        "roofline_s": seconds,
    }


def at_peak(one: hlo.Collective, chip: Chip) -> float:
    """Seconds that communication of one kind takes at the published peak of its network."""
    if one.network == "dcn":
        return one.sent / (chip.network / chip.devices)
    # Small collectives take the time of their hops.
    return max(one.sent / (chip.ring / chip.devices), one.hops * HOP_S)


def too_large(message: str, text: str, arguments: tuple[Tree, ...]) -> dict:
    """Explains a program that does not fit: the compiler's reason and the largest tensors.

    Args:
        message: Message of the compiler's error.
        text: StableHLO of the program. It is not partitioned yet, so that tensors have the sizes of
            all devices together, except inside of attention.
        arguments: Shapes with shardings of the arguments.

    Raises:
        RuntimeError: If the message is about something else than memory.
    """
    reason = message.splitlines()[0]
    if "RESOURCE_EXHAUSTED" not in reason:
        raise RuntimeError(reason)
    # Such as tensor<8x1024x1536xbf16>: sizes, then a type that ends in its number of bits.
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

    def largest(sizes: Iterable[tuple[int, str]], what: str) -> list[str]:
        return [
            f"{size / 2**20:,.0f} MiB {what} {x}" for size, x in sorted(sizes, reverse=True)[:5]
        ]

    return {
        "reason": reason.partition("RESOURCE_EXHAUSTED: ")[2],
        "largest": largest(tensors, "on all devices:") + largest(named, "per device:"),
    }


def mesh_text(found: dict) -> str:
    """Describes the mesh of a plan."""
    return ", ".join(f"{k} {v}" for k, v in found["mesh"].items() if v > 1) or "one device"
