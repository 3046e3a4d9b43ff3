"""Whether a kernel's addresses are right in tensors of more than 2³¹ elements.

Read from Triton's own intermediate code: each offset that is added to a pointer, and all that it
was computed from. A product of a row and a stride must be made in 64 bits; 32 bits are enough
inside a tile, and wherever the grid and the arguments of the launch keep the product small.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

LIMIT = 2**31


@dataclass
class Value:
    operation: str  # "arith.muli" and so on; "argument", "index" (of a loop), "carried" (by one)
    operands: list[str]
    text: str

    @property
    def is_int32(self) -> bool:
        return re.search(r"(?:\b|x)i32>?$", self.text) is not None


@dataclass
class Region:
    """Where the values of its `scf.yield` and, in a `while`, of its `scf.condition` go, in order:
    the operand lists that they join."""

    yields: list[list[list[str]]] = field(default_factory=list)
    conditions: list[list[list[str]]] = field(default_factory=list)


def narrow_products(ttir: str, grid: tuple[int, ...], arguments: Mapping[str, object]) -> list[str]:
    """The 32-bit products in addresses that this launch could overflow, as the intermediate code
    has them; none in a right kernel."""
    values = parse(ttir)
    known = {f"%{name}": n for name, n in arguments.items() if isinstance(n, int)}
    found: dict[str, None] = {}
    for value in values.values():
        if value.operation != "tt.addptr":
            continue
        for step in _origins(value.operands[1], values):
            if step.operation == "arith.muli" and step.is_int32:
                a, b = (_largest(name, values, known, grid) for name in step.operands)
                if a * b >= LIMIT:
                    found[step.text] = None
    return list(found)


def parse(ttir: str) -> dict[str, Value]:
    """What makes each value of a kernel. What a branch or a loop hands on has all of its possible
    origins as operands."""
    ttir = re.sub(r" loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", "", ttir)
    values: dict[str, Value] = {}
    regions: list[Region] = []
    for line in map(str.strip, ttir.splitlines()):
        if line.startswith("tt.func"):
            for name in re.findall(r"(%\w+): ", line):
                values[name] = Value("argument", [], name)
        results = _results(line, values)
        if line.startswith(("scf.yield", "scf.condition")):
            handed = _names(re.sub(r"^scf.condition\(%\w+\)", "", line))
            kind = "yields" if line.startswith("scf.yield") else "conditions"
            for targets, name in zip(getattr(regions[-1], kind), handed, strict=False):
                for operands in targets:
                    operands.append(name)
        if line.startswith("^bb") and regions and regions[-1].conditions:
            for targets, name in zip(
                regions[-1].conditions, re.findall(r"(%\w+): ", line), strict=True
            ):
                values[name] = Value("carried", [], name)
                targets.append(values[name].operands)
        again = line.startswith("}") and line.endswith("{")  # "} else {", "} do {"
        if line.startswith("}") and regions and not again:
            regions.pop()
        elif line.endswith(("{", "({")) and not again:
            regions.append(_opened(line, results, values))
    return values


def _names(text: str) -> list[str]:
    """The values named before the types."""
    return re.findall(r"%\w+(?:#\d+)?", text.split(" : ")[0])


def _results(line: str, values: dict[str, Value]) -> list[list[str]]:
    """Enters what the line makes; returns the operand list of each result."""
    made = re.match(r"(%\w+)(?::(\d+))? = \"?([\w.]+)\"?(.*)", line)
    if not made:
        return []
    name, many, operation, rest = made.groups()
    branches = operation.startswith("scf.")
    names = [name] if many is None else [f"{name}#{i}" for i in range(int(many))]
    for each in names:
        operands = [] if branches else _names(rest)
        values[each] = Value("carried" if branches else operation, operands, line)
    return [values[each].operands for each in names]


def _opened(line: str, results: list[list[str]], values: dict[str, Value]) -> Region:
    """The region that a line opens, and the values that live in it from its start."""
    region = Region(yields=[[operands] for operands in results])
    index = re.search(r"scf\.for (%\w+) = (%[\w#]+) to (%[\w#]+)", line)
    if index:
        values[index[1]] = Value("index", [index[2], index[3]], line)
    carried = re.search(r"(?:iter_args|scf\.while) ?\((.*?)\) (?:->|:)", line)
    starts = re.findall(r"(%\w+) = (%[\w#]+)", carried[1]) if carried else []
    if "scf.while" in line:
        region = Region(yields=[[] for _ in starts], conditions=region.yields)
    for i, (name, start) in enumerate(starts):
        values[name] = Value("carried", [start], name)
        region.yields[i].append(values[name].operands)
        if index:
            results[i].append(start)
    return region


def _origins(name: str, values: Mapping[str, Value]) -> Iterator[Value]:
    """All that a value was computed from. A load ends the search: what it gives was put there by
    the caller, whatever its own address."""
    seen, todo = set[str](), [name]
    while todo:
        name = todo.pop()
        if name in seen or name not in values:
            continue
        seen.add(name)
        yield values[name]
        if values[name].operation != "tt.load":
            todo += values[name].operands


_SAME = (
    "tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.trans",
    "arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast",
)  # fmt: skip


def _largest(
    name: str, values: Mapping[str, Value], known: Mapping[str, int], grid: tuple[int, ...]
) -> float:
    """A bound on the size of an integer: infinite for what is loaded or carried by a loop."""
    value = values[name]

    def largest(i: int) -> float:
        return _largest(value.operands[i], values, known, grid)

    match value.operation:
        case "argument":
            return abs(known.get(name, math.inf))
        case "arith.constant":
            numbers = re.findall(r"-?\d+", value.text.partition("constant")[2].split(" : ")[0])
            return max((abs(int(n)) for n in numbers), default=1)  # true and false have no digits
        case "tt.get_program_id" | "tt.get_num_programs":
            return (*grid, 1, 1)["xyz".index(value.text.split(" : ")[0][-1])]
        case "tt.make_range":
            return int(re.findall(r"end = (\d+)", value.text)[0])
        case "arith.addi" | "arith.subi":
            return largest(0) + largest(1)
        case "arith.muli":
            return largest(0) * largest(1)
        case "arith.minsi":  # of sizes and positions, which are not negative
            return min(largest(0), largest(1))
        case "arith.maxsi":
            return max(largest(0), largest(1))
        case "arith.remsi":
            return min(largest(0), largest(1))
        case "arith.divsi":
            by = values[value.operands[1]]
            divisor = largest(1) if by.operation in ("arith.constant", "argument") else 1
            return largest(0) // max(1, divisor)
        case "arith.select":
            return max(largest(1), largest(2))
        case "index":
            return largest(1)
        case same if same in _SAME:
            return largest(0)
    return math.inf
