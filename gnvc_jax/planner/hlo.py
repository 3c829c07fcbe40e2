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
        if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", self.rest):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
            axes = re.findall(r"(\w+)'?(?::\(\d+\)(\d+))?", found[2])  # or `axis:(before)size`
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        return 1


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
        network: "ici" for links inside of a slice, "dcn" for the network between slices.
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


def collectives(text: str, trip_count: float = 1.0) -> list[Collective]:
    """Adds up the communication of one run of a compiled program, by network and kind.

    Args:
        text: HLO text of the program.
        trip_count: Trip count assumed for loops whose length is not known before they run.
    """
    entry, computations = parse(text)
    types = {name: {i.name: i.result for i in body} for name, body in computations.items()}
    totals, seen = defaultdict(lambda: [0.0] * 4), set()

    def count(network: str, kind: str, times: float, given: int, n: int) -> None:
        # Of the operand, which is a device's own part for an all-gather and the whole array
        # otherwise; see `Collective.sent`.
        part = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}
        sent = given * part.get(kind, (n - 1) / n)
        hops = {"all-reduce": 2 * (n // 2), "collective-permute": 1}.get(kind, n // 2)
        if sent:
            for i, value in enumerate((1, given, sent, hops)):
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
        count("ici", kind, times, given, n)

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
