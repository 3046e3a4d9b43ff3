"""The CSV: one row a run, appended when the run is over, so that a stopped sweep goes on."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Run:
    """One run: what it was, and what its student is like. bits_per_byte is NaN if it diverged.

    alpha: the share of cross-entropy that was chosen; one ablation puts another in its place.
    """

    setting: str
    regime: str
    variant: str
    split: str  # "dev", "test", or "speed", which measures seconds and memory alone
    learning_rate: float
    alpha: float
    seed: int
    steps: int
    bits_per_byte: float
    agreement: float
    rouge_l: float
    other_bits_per_byte: float
    seconds_a_step: float
    peak_gib: float


_KINDS = {"str": str, "float": float, "int": int}


def read(path: Path, kind: type[Any] = Run) -> list[Any]:
    """Every row of a CSV, as a dataclass; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            kind(**{x.name: _KINDS[str(x.type)](row[x.name]) for x in fields(kind)})
            for row in csv.DictReader(file)
        ]


def append(path: Path, row: Any) -> None:
    """One more row, of a dataclass."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [x.name for x in fields(row)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v
                         for k, v in asdict(row).items()})  # fmt: skip


def of(runs: Sequence[Run], **wanted: object) -> list[Run]:
    """The runs whose fields have these values."""
    return [run for run in runs if all(getattr(run, k) == v for k, v in wanted.items())]
