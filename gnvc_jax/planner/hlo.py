"""What a compiled program sends between devices and moves through memory, read from its text.

XLA (openxla.org/xla/operation_semantics) prints a program after partitioning, so that shapes are
those of one device. Loops are taken as often as they turn.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
CHAIN = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')
KIND = re.compile(r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?")
BITS = {"pred": 8, "token": 0}

# Instructions that move nothing, or whose parts are looked at one by one.
NO_TRAFFIC = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call|after-all|iota"
    r"|partition-id|.*-done"
)


def size(types: str, on_chip: bool = True) -> int:
    """Bytes of all arrays in the text of a type; on_chip: also of those in a chip's own memory."""
    bits = 0
    for dtype, dims, layout in ARRAY.findall(types):
        if on_chip or not re.search(r"S\([1-9]", layout):
            width = re.search(r"\d+", dtype)
            each = BITS.get(dtype) if dtype in BITS else int(width[0])
            bits += each * math.prod(int(dim) for dim in dims.split(",") if dim)
    return bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line `name = result operation(operands), attributes`."""

    root: bool
    name: str
    result: str
    operation: str
    rest: str

    @cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])

    def calls(self, attribute: str) -> str | None:
        """Name of the computation that an attribute refers to."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None

    @property
    def group(self) -> int:
        """Devices that take part in a collective together."""
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
    """Name of the entry, and the instructions of each computation."""
    computations, entry, current = {}, "", []
    for line in text.splitlines():
        if found := COMPUTATION.match(line):
            current = computations[found[2]] = []
            entry = found[2] if found[1] else entry
        elif found := INSTRUCTION.match(line):
            current.append(Instruction(bool(found[1]), *found.groups()[1:]))
    return entry, computations


def loop_trip_count(loop: Instruction, computations: Computations) -> int | None:
    """Trip count of a loop: what it says, or the constant that its counter is compared with."""
    if known := TURNS.search(loop.rest):
        return int(known[1])
    condition = computations[loop.calls("condition")]
    bounds = [i for i in condition if i.operation == "constant" and i.result.startswith("s32")]
    ends = [i for i in condition if i.operation == "compare" and "direction=LT" in i.rest]
    return int(bounds[0].rest.split(")")[0]) if len(bounds) == len(ends) == 1 else None


def runs(
    entry: str, computations: Computations, trip_count: float
) -> Iterator[tuple[float, str, Instruction]]:
    """(how often it runs, its computation, the instruction), without the insides of fusions."""

    def visit(name: str, times: float):
        for instruction in computations[name]:
            yield times, name, instruction
            if instruction.operation == "while":
                inside = times * (loop_trip_count(instruction, computations) or trip_count)
                yield from visit(instruction.calls("body"), inside)
            elif instruction.operation == "conditional":
                listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
                named = [instruction.calls(f"{x}_computation") for x in ("true", "false")]
                for one in re.findall(r"[\w.\-]+", listed[1]) if listed else named:
                    yield from visit(one, times)
            elif instruction.operation in ("call", "async-start"):
                called = instruction.calls("to_apply") or instruction.calls("calls")
                yield from visit(called, times)

    yield from visit(entry, 1.0)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of communication: how often per run, bytes that a device gives in, and sends.

    Sent bytes are those of a ring of n devices: n - 1 parts to gather, (n - 1) / n of what is
    scattered or exchanged, twice that for a reduction whose result all have.
    """

    kind: str
    count: float
    bytes: float
    sent: float


def collectives(text: str, trip_count: float = 1.0) -> list[Collective]:
    """Communication of one run of a compiled program, by kind.

    trip_count: of loops whose length is not known before they run.
    """
    entry, computations = parse(text)
    types = {name: {i.name: i.result for i in body} for name, body in computations.items()}
    totals, seen = defaultdict(lambda: [0.0, 0.0, 0.0]), set()

    def add(times: float, where: str, one: Instruction) -> None:
        found = KIND.fullmatch(one.operation)
        if found is None:
            return
        # TPU: a collective that overlaps with computation stands in each fusion it overlaps with.
        if chain := CHAIN.search(one.rest):
            if chain.groups() in seen:
                return
            seen.add(chain.groups())
        kind, n = found[1], one.group
        if where.startswith("all-reduce-scatter"):  # TPU: each device keeps its part only
            kind = "reduce-scatter"
        given = sum(size(types[where][x]) for x in one.operands if x in types[where])
        part = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}
        sent = given * part.get(kind, (n - 1) / n)
        if sent:
            for i, value in enumerate((1, given, sent)):
                totals[kind][i] += times * value

    for times, where, instruction in runs(entry, computations, trip_count):
        add(times, where, instruction)
        if instruction.operation == "fusion":
            inner = instruction.calls("calls")
            for one in computations[inner]:
                add(times, inner, one)
    return [Collective(kind, *values) for kind, values in sorted(totals.items())]


def traffic(text: str, trip_count: float = 1.0) -> float:
    """Bytes that one run moves between a device and its memory: operands and results of each
    instruction, of slices and of updates in place only the part that is touched.
    """
    entry, computations = parse(text)
    types = {name: {i.name: i.result for i in body} for name, body in computations.items()}
    total = 0.0
    for times, where, one in runs(entry, computations, trip_count):
        if NO_TRAFFIC.fullmatch(one.operation):
            continue
        operands = [size(types[where].get(x, ""), on_chip=False) for x in one.operands]
        result = size(one.result, on_chip=False)
        body = [one]
        if one.operation == "fusion":
            body = computations[one.calls("calls")]
            operands = [min(a, b) for a, b in zip(operands, touched(body))]
        for inner in body:
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
    """Bytes read of each parameter of a fusion: all, or the slices where only slices are taken."""
    read = {}
    for parameter in (i for i in body if i.operation == "parameter"):
        users = [i for i in body if parameter.name in i.operands]
        sliced = all(i.operation in ("dynamic-slice", "gather") for i in users)
        number = int(parameter.rest.split(")")[0])
        read[number] = sum(size(i.result) for i in users) if sliced else math.inf
    return [read[i] for i in range(len(read))]
