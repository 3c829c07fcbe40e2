"""Communication and memory traffic of a compiled program, read from its HLO text.

XLA prints a program after partitioning, so that shapes are those of one device (for the semantics
of operations see openxla.org/xla/operation_semantics). `parse` splits the text into computations,
`runs` walks them with the number of times that each instruction executes, loops included, and
`collectives` and `traffic` add up what the instructions send and move.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property

import numpy as np

# `ENTRY %main.42 (x: f32[8]) -> f32[8] {` begins a computation; its instructions follow, indented:
# `  ROOT %add.1 = f32[8]{0} add(%x, %y), metadata={...}`.
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# On TPU one collective can be cut into a chain of fusions; these two numbers identify it.
CHAIN = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')
# Between slices, libtpu turns a collective into a transfer to the host, which a runtime of its own
# (Megascale) carries out: `send(...) frontend_attributes={..., _xla_megascale_target="{1,2}x{0:7}",
# _xla_megascale_transfer_type="ALL_REDUCE"}` for slices 1 and 2 of eight devices each.
TRANSFER = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}.*_transfer_type="(\w+)"')
# Groups along axes of a mesh, whose devices may be in another order than their numbers.
MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
KIND = re.compile(r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?")
TRANSFERS = {"ONE_TO_ONE": "collective-permute"}
BITS = {"pred": 8, "token": 0}

# Instructions that move nothing themselves, or whose parts are visited one by one.
NO_TRAFFIC = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call|after-all|iota"
    r"|partition-id|.*-done"
)


def size(types: str, on_chip: bool = True) -> int:
    """Adds up the bytes of all arrays in the text of a type.

    Args:
        types: Type such as "f32[8,16]{1,0}" or a tuple of types.
        on_chip: Whether to count arrays in a chip's on-chip memory (VMEM), too.
    """
    bits = 0
    for dtype, dims, layout in ARRAY.findall(types):
        # The layout of an array in another memory space than HBM ends in S(1) or higher.
        if on_chip or not re.search(r"S\([1-9]", layout):
            width = BITS[dtype] if dtype in BITS else int(re.findall(r"\d+", dtype)[0])
            bits += width * math.prod(int(dim) for dim in dims.split(",") if dim)
    return bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line `name = result operation(operands), attributes`.

    Attributes:
        root: Whether this is the result of its computation.
        name: Name of the instruction, unique within the computation.
        result: Text of the type of the result.
        operation: Opcode, such as "dot".
        rest: Operands and attributes.
    """

    root: bool
    name: str
    result: str
    operation: str
    rest: str

    @cached_property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])

    def calls(self, *attributes: str) -> str:
        """Name of the computation that the first of these attributes to be present refers to."""
        for attribute in attributes:
            if found := re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest):
                return found[1]
        raise KeyError(f"{self.name}: no attribute {' or '.join(attributes)}")

    @property
    def group(self) -> int:
        """Number of devices that take part in a collective together."""
        # Three notations: all groups listed, their number and size, or axes of a named mesh.
        if found := re.search(r"replica_groups=\{\{([\d,]*)\}", self.rest):
            return len(found[1].split(","))
        if found := re.search(r"replica_groups=\[\d+,(\d+)\]", self.rest):
            return int(found[1])
        if found := MESH.search(self.rest):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
            axes = re.findall(r"(\w+)'?(?::\(\d+\)(\d+))?", found[3])  # or `axis:(before)size`
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        return 1

    def members(self, devices: int) -> list[list[int]]:
        """Numbers of the devices of each group of a collective, or pairs of a permutation.

        Args:
            devices: Number of devices of the program, which form one group if none is named.
        """
        if pairs := re.search(r"source_target_pairs=\{\{([\d,{}]*)\}\}", self.rest):
            return [[int(x) for x in pair.split(",")] for pair in pairs[1].split("},{")]
        if found := re.search(r"replica_groups=\{\{([\d,{}]*)\}\}", self.rest):
            return [[int(x) for x in group.split(",")] for group in found[1].split("},{")]
        if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\S+\])(T\([\d,]+\))?", self.rest):
            groups = int(found[1]), int(found[2])
            return numbered(found[3] + (found[4] or "")).reshape(groups).tolist()
        if found := MESH.search(self.rest):
            return mesh_groups(*found.groups())
        return [list(range(devices))]


def numbered(text: str) -> np.ndarray:
    """Numbers in the order of a text such as `[2,4]T(1,0)`: an array of 2x4, transposed."""
    dims, *order = re.findall(r"[\d,]+", text)
    numbers = np.arange(math.prod(map(int, dims.split(",")))).reshape(
        [int(x) for x in dims.split(",")]
    )
    return numbers.transpose([int(x) for x in order[0].split(",")]) if order else numbers


def mesh_groups(mesh: str, ids: str | None, axes: str) -> list[list[int]]:
    """Groups of devices along axes of a mesh.

    Args:
        mesh: Sizes of the axes, such as `'a'=4,'b'=8`.
        ids: Numbers of the devices of the mesh, such as `[2,4]T(1,0)` or `0,2,1,3`; by default in
            order.
        axes: Axes of a group, such as `'a','b':(2)4`. `(2)4` is the part of size 4 of an axis that
            follows a part of size 2.
    """
    chosen = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)
    shape, along = [], []
    for name, size in re.findall(r"'(\w+)'=(\d+)", mesh):
        parts = sorted((int(a or 1), int(b or size)) for one, a, b in chosen if one == name)
        before = 1
        for start, length in parts:
            # What lies between the parts that were chosen belongs to other groups.
            shape += [start // before, length]
            along.append(len(shape) - 1)
            before = start * length
        shape.append(int(size) // before)
    if ids is None:
        numbers = np.arange(math.prod(shape))
    elif ids.startswith("["):
        numbers = numbered(ids)
    else:
        numbers = np.array([int(x) for x in ids.split(",")])
    others = [i for i in range(len(shape)) if i not in along]
    numbers = numbers.reshape(shape).transpose(others + along)
    return numbers.reshape(-1, math.prod(shape[i] for i in along)).tolist()


Computations = dict[str, list[Instruction]]


def parse(text: str) -> tuple[str, Computations]:
    """Splits HLO text into the name of the entry computation and all computations by name."""
    computations, entry, current = {}, "", []
    for line in text.splitlines():
        if found := COMPUTATION.match(line):
            current = computations[found[2]] = []
            entry = found[2] if found[1] else entry
        elif found := INSTRUCTION.match(line):
            current.append(Instruction(bool(found[1]), *found.groups()[1:]))
    return entry, computations


def loop_trip_count(loop: Instruction, computations: Computations) -> int | None:
    """Trip count of a loop, None if it cannot be told.

    XLA annotates most loops with it; otherwise it is the constant that the counter is compared
    with, if the condition has but one constant and one comparison.
    """
    if known := TRIP_COUNT.search(loop.rest):
        return int(known[1])
    condition = computations[loop.calls("condition")]
    bounds = [i for i in condition if i.operation == "constant" and i.result.startswith("s32")]
    ends = [i for i in condition if i.operation == "compare" and "direction=LT" in i.rest]
    return int(bounds[0].rest.split(")")[0]) if len(bounds) == len(ends) == 1 else None


def runs(
    entry: str, computations: Computations, trip_count: float
) -> Iterator[tuple[float, str, Instruction]]:
    """Walks the instructions of a program, loops and branches included, fusions from outside only.

    Args:
        entry: Name of the entry computation.
        computations: All computations, see `parse`.
        trip_count: Trip count assumed for loops whose length is not known before they run.

    Yields:
        (times it executes, name of its computation, instruction).
    """

    def visit(name: str, times: float) -> Iterator[tuple[float, str, Instruction]]:
        for instruction in computations[name]:
            yield times, name, instruction
            if instruction.operation == "while":
                inside = times * (loop_trip_count(instruction, computations) or trip_count)
                yield from visit(instruction.calls("body"), inside)
            elif instruction.operation == "conditional":
                listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
                if listed:
                    branches = re.findall(r"[\w.\-]+", listed[1])
                else:
                    branches = [instruction.calls(f"{x}_computation") for x in ("true", "false")]
                for one in branches:  # every branch counts, as if all were taken
                    yield from visit(one, times)
            elif instruction.operation in ("call", "async-start"):
                called = instruction.calls("to_apply", "calls")
                yield from visit(called, times)

    yield from visit(entry, 1.0)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication of one kind in one run of a program, on each device.

    Attributes:
        network: "ici" for links inside of a slice or machine, "dcn" for the network between them.
        kind: Name of the collective, such as "all-gather".
        count: Number of times it executes.
        bytes: Bytes of its operands.
        sent: Bytes that a device sends if the n devices of a group form a ring: n - 1 times the
            operand for an all-gather, (n - 1) / n of it for a reduce-scatter or all-to-all, twice
            that for an all-reduce, all of it for a permutation.
        hops: Links that data crosses one after another, if a ring works in both directions: half of
            it, all of it for an all-reduce, one for a permutation.
    """

    network: str
    kind: str
    count: float
    bytes: float
    sent: float
    hops: float


def share_between(kind: str, members: list[list[int]], per_node: int) -> float:
    """Share of what a device sends in a collective that goes to other machines.

    NCCL lays several rings over the devices of a group, which leave a machine at another device
    each. So of n devices, m in each machine, each sends 1 / m of its data to another machine. In an
    all-to-all, n - m of its n - 1 partners are there.

    Args:
        kind: Name of the collective.
        members: Groups, or pairs of a permutation, of which the worst counts.
        per_node: Devices of one machine.
    """
    spread = [(len(group), len({i // per_node for i in group})) for group in members]
    n, nodes = max(spread, key=lambda one: one[1])
    if nodes == 1:
        return 0.0
    local = n / nodes
    return {"collective-permute": 1.0, "all-to-all": (n - local) / (n - 1)}.get(kind, 1 / local)


def collectives(
    text: str, trip_count: float = 1.0, per_node: int | None = None
) -> list[Collective]:
    """Adds up the communication of one run of a compiled program, by network and kind.

    Args:
        text: HLO text of the program.
        trip_count: Trip count assumed for loops whose length is not known before they run.
        per_node: Devices of one machine, for programs whose collectives span machines (GPUs);
            devices are numbered machine by machine. None for TPUs, where the compiler divides such
            collectives itself.
    """
    entry, computations = parse(text)
    types = {name: {i.name: i.result for i in body} for name, body in computations.items()}
    totals, seen = defaultdict(lambda: [0.0] * 4), set()

    def count(
        network: str, kind: str, times: float, given: int, n: int, part_sent: float = 1.0
    ) -> None:
        # Of the operand, which is a device's own part for an all-gather and the whole array
        # otherwise; see `Collective.sent`.
        part = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}
        sent = given * part.get(kind, (n - 1) / n)
        hops = {"all-reduce": 2 * (n // 2), "collective-permute": 1}.get(kind, n // 2)
        if sent:
            for i, value in enumerate((1, given, sent * part_sent, hops)):
                totals[network, kind][i] += times * value

    def add(times: float, where: str, one: Instruction) -> None:
        found = KIND.fullmatch(one.operation)
        if found is None:
            if one.operation == "send" and (transfer := TRANSFER.search(one.rest)):
                listed, name = transfer.groups()
                kind = TRANSFERS.get(name, name.lower().replace("_", "-"))
                # `(f32[256,1024]{1,0}, u32[], token[])`: the data come first.
                data = one.result.lstrip("(").split(", u32")[0]
                count("dcn", kind, times, size(data), slice_count(listed))
            return
        # On TPU a collective that overlaps with computation appears in each fusion that it
        # overlaps with, and must be counted once.
        if chain := CHAIN.search(one.rest):
            if chain.groups() in seen:
                return
            seen.add(chain.groups())
        kind, n = found[1], one.group
        # On TPU an all-reduce of which each device keeps its part only is a fusion of this name.
        if where.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        given = sum(size(types[where][x]) for x in one.operands if x in types[where])
        between = 0.0
        if per_node is not None:
            between = share_between(kind, one.members(per_node), per_node)
        for network, share in (("ici", 1 - between), ("dcn", between)):
            if share > 0:
                count(network, kind, times, given, n, share)

    for times, where, instruction in runs(entry, computations, trip_count):
        add(times, where, instruction)
        if instruction.operation == "fusion":
            inner = instruction.calls("calls")
            for one in computations[inner]:
                add(times, inner, one)
    # Links inside of a slice first.
    found = sorted(totals.items(), key=lambda item: (item[0][0] == "dcn", item[0]))
    return [Collective(*names, *values) for names, values in found]


def slice_count(listed: str) -> int:
    """Number of slices in a list such as "1,2,5:8"."""
    ends = ([int(x) for x in part.split(":")] for part in listed.split(","))
    return sum(each[-1] - each[0] + 1 for each in ends)


def traffic(text: str, trip_count: float = 1.0) -> float:
    """Estimates the bytes that one run moves between a device and its memory.

    Each instruction, or fusion, reads its operands and writes its result once. Of slices and of
    updates in place, only the part that is touched counts.

    Args:
        text: HLO text of the program.
        trip_count: Trip count assumed for loops whose length is not known before they run.
    """
    entry, computations = parse(text)
    types = {name: {i.name: i.result for i in body} for name, body in computations.items()}
    total = 0.0
    for times, where, one in runs(entry, computations, trip_count):
        # Operands and results are counted where they are used and made.
        if NO_TRAFFIC.fullmatch(one.operation):
            continue
        operands = [size(types[where].get(x, ""), on_chip=False) for x in one.operands]
        result = size(one.result, on_chip=False)
        body = [one]
        if one.operation == "fusion":
            body = computations[one.calls("calls")]
            # A fusion may take a slice of a large operand, such as one layer of stacked parameters.
            operands = [min(a, b) for a, b in zip(operands, touched(body))]
        for inner in body:
            # In place: the part that is written is moved, and the rest of the buffer stays where it
            # is.
            if inner.operation == "dynamic-update-slice" and inner.root:
                updated = size(
                    types[where if inner is one else one.calls("calls")][inner.operands[1]]
                )
                result, operands = min(result, updated), [min(x, updated) for x in operands]
            elif inner is one and one.operation in ("dynamic-slice", "gather"):
                operands = [min(x, result) for x in operands]
        total += times * (result + sum(operands))
    return total


def touched(body: list[Instruction]) -> list[float]:
    """Bytes that a fusion reads of each parameter: infinite, or those of the slices it takes."""
    read = {}
    for parameter in (i for i in body if i.operation == "parameter"):
        users = [i for i in body if parameter.name in i.operands]
        sliced = all(i.operation in ("dynamic-slice", "gather") for i in users)
        number = int(parameter.rest.split(")")[0])
        read[number] = sum(size(i.result) for i in users) if sliced else math.inf
    return [read[i] for i in range(len(read))]
