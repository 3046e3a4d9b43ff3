"""One row for each compiled kernel, as a table and as CSV."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    target: str
    kernel: str
    dtype: str
    case: str
    config: str
    registers: int
    spills: int  # bytes a thread
    stack: int  # bytes a thread
    shared: int  # bytes a block
    aligned: bool  # whether rows begin at multiples of 16 bytes, so that wide loads are possible
    load: int  # bits of the widest load from global memory
    wide_percent: int  # of the loaded bits, those in loads of 128 bits and more
    loads: str  # "16x2 128x4": two of 16 bits, four of 128
    overflows: str  # 32-bit products in addresses that could exceed 32 bits


FIELDS = [field.name for field in dataclasses.fields(Row)]


def write(path: str | Path, rows: Iterable[Row]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, rows))


def read(path: str | Path) -> list[Row]:
    with open(path, newline="") as file:
        return [_row(line) for line in csv.DictReader(file)]


def _row(line: dict[str, str]) -> Row:
    values: dict[str, object] = dict(line)
    for field in dataclasses.fields(Row):
        text = line[field.name]
        if field.type == "int":
            values[field.name] = int(text)
        elif field.type == "bool":
            values[field.name] = text == "True"
    return Row(**values)  # type: ignore[arg-type]


def show(rows: Sequence[Row]) -> None:
    lines = [FIELDS, *([str(value) for value in dataclasses.astuple(row)] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(FIELDS))]
    for line in lines:
        print("  ".join(text.ljust(n) for text, n in zip(line, widths, strict=True)).rstrip())
