"""The targets for an H100, each beside what the CSVs of a GPU run hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.plot import Row, read, table

MEBIBYTE = 2**20


class Target(NamedTuple):
    """`case` and `how` pick a row of ours; `figure` is at most, or if `least` at least, `bound`."""

    op: str
    case: str
    how: dict[str, str]
    what: str
    figure: Callable[[Row], float]
    bound: float
    least: bool = False


def milliseconds(row: Row) -> float:
    return float(row["median_ms"])


def of_memory(row: Row) -> float:
    """Percent of the rate of a copy that moves as many bytes."""
    return float(row["pct_of_roofline"])


def times_three_passes(row: Row) -> float:
    """Over the time in which a copy would read both logits and write the gradient."""
    return 100 / float(row["pct_of_roofline"])


def gigabytes(row: Row) -> float:
    return float(row["peak_mib"]) * MEBIBYTE / 1e9


LARGE = "Llama-3.2-1B ← Llama-3.1-8B, 8,192 rows"
TARGETS = (
    Target("span_com", "8,192 × 4,096, token spans", {}, "% of a copy", of_memory, 85, least=True),
    Target(
        "span_kl", "Llama-3.2-1B, one vocabulary, 8,192 rows", {}, "× its three passes",
        times_three_passes, 1.6,
    ),
    Target("linear_span_kl", LARGE, {"head": "trained"}, "ms", milliseconds, 38),
    Target("linear_span_kl", LARGE, {"head": "trained"}, "GB above the inputs", gigabytes, 2.5),
    Target(
        "linear_span_kl", "Llama-3.1-8B ← Llama-3.1-8B, 8,192 rows", {}, "ms", milliseconds, 56
    ),
    Target(
        "attention_mass", "Llama-3.1-8B, batch 1, 8,192 tokens", {"mode": "all rows"}, "ms",
        milliseconds, 0.5,
    ),
)  # fmt: skip
OF_A_STEP = 5  # percent


def summary(folder: Path) -> str:
    """A Markdown table; a target whose row is missing says so."""
    lines = []
    for target in TARGETS:
        found = _row(folder / f"{target.op}.csv", target)
        sign = "≥" if target.least else "≤"
        wanted = f"{sign} {target.bound:g} {target.what}"
        if found is None:
            lines.append((target.op, target.case, wanted, "", "not measured"))
            continue
        value = target.figure(found)
        good = value >= target.bound if target.least else value <= target.bound
        lines.append((target.op, target.case, wanted, f"{value:.3g}", "met" if good else "missed"))
    path = folder / "step.json"
    wanted = f"≤ {OF_A_STEP} % of a step"
    if path.exists():
        share = json.loads(path.read_text())["loss in % of the step"]
        met = "met" if share <= OF_A_STEP else "missed"
        lines.append(("SRA loss", "a student of 1B", wanted, f"{share:.3g}", met))
    else:
        lines.append(("SRA loss", "a student of 1B", wanted, "", "not measured"))
    return "\n".join(table(("op", "case", "target", "measured", ""), lines, words=3))


def _row(path: Path, target: Target) -> Row | None:
    """The last measurement: a CSV may hold those of several commits."""
    rows = read(path) if path.exists() else []
    wanted = {"provider": "ours", "case": target.case, **target.how}
    fitting = [r for r in rows if r["median_ms"] and wanted.items() <= r.items()]
    return fitting[-1] if fitting else None
