"""An op's CSV, and nothing else, becomes a table and a picture: `python -m benchmarks.plot CSV`."""

from __future__ import annotations

import csv
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

Row = dict[str, str]

# The columns that a measurement fills; those between `provider` and `malloc` describe the case.
MEASURED = (
    "median_ms",
    "p20_ms",
    "p80_ms",
    "min_ms",
    "samples",
    "gb_per_s",
    "pct_of_copy",
    "peak_mib",
    "error_vs_float64",
    "status",
)
# The columns that make one panel of the picture and one line of the summary, where an op has them.
GROUP = ("mode", "grads", "dtype")
OURS = "ours"


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def case_columns(rows: Sequence[Row]) -> list[str]:
    names = list(rows[0])
    return names[names.index("provider") + 1 : names.index("malloc")]


def write(path: Path) -> tuple[Path, Path]:
    """Writes the Markdown table and the picture beside the CSV."""
    rows = read(path)
    table, picture = path.with_suffix(".md"), path.with_suffix(".svg")
    table.write_text(markdown(rows, picture.name))
    draw(rows, picture)
    return table, picture


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _key(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(row[name] for name in names)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], words: int) -> list[str]:
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return [_line(head), _line(rule), *map(_line, lines), ""]


def _cell(row: Row | None, column: str) -> str:
    if row is None:
        return ""
    if not row[column]:
        return "refused" if row["status"] != "ok" else ""
    value = float(row[column])
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def markdown(rows: Sequence[Row], picture: str) -> str:
    op, first = rows[0]["op"], rows[0]
    names = case_columns(rows)
    providers = _unique(row["provider"] for row in rows)
    rivals = [p for p in providers if p != "copy" and not p.startswith(OURS)]
    mallocs = _unique(row["malloc"] for row in rows)
    at = {(row["malloc"], _key(row, names), row["provider"]): row for row in rows}
    cases = _unique_keys(rows, names)
    out = [
        f"# {op}",
        "",
        f"{first['cpu']}, {first['threads']} threads; torch {first['torch']}, Python "
        f"{first['python']}; commit {first['commit']}"
        f"{' with changes' if int(first['dirty']) else ''}"
        f", {first['timestamp'][:10]}. Written by `python -m benchmarks.run` from `{op}.csv`.",
        "",
        f"![{op}]({picture})",
        "",
    ]

    group = [name for name in GROUP if name in names]
    if rivals:
        out += [f"## Times as fast as each rival: {OURS}, middle case (worst – best)", ""]
        lines = []
        for malloc in mallocs:
            for part in _unique_keys(rows, group):
                inside = [c for c in cases if _project(c, names, group) == part]
                ours = [at.get((malloc, c, OURS)) for c in inside]
                line = [malloc, *part]
                if any(row and row["pct_of_copy"] for row in ours):
                    line.append(_spread([float(r["pct_of_copy"]) for r in ours if r], "%"))
                for rival in rivals:
                    line.append(
                        _spread(
                            [
                                float(other["median_ms"]) / float(mine["median_ms"])
                                for mine, c in zip(ours, inside, strict=True)
                                if (other := at.get((malloc, c, rival)))
                                and other["median_ms"]
                                and mine
                                and mine["median_ms"]
                            ],
                            "×",
                        )
                    )
                lines.append(line)
        share = ["of copy bandwidth"] if len(lines[0]) > 1 + len(group) + len(rivals) else []
        out += _table(["malloc", *group, *share, *rivals], lines, 1 + len(group))
    if any(row["pct_of_copy"] for row in rows):
        out += [
            "The share of copy bandwidth: bytes that the op has to move at least, over its time, "
            "against the same for `torch.Tensor.copy_` between buffers that are already mapped, "
            "measured in the same turns. A copy is half writes, which cost more than reads: an op "
            "that mostly reads can be above 100 %. Under the default malloc every result is fresh "
            "memory, which the copy is spared.",
            "",
        ]

    for malloc in mallocs:
        out += [f"## Median milliseconds, {malloc} malloc", ""]
        out += _table(
            [*names, *providers],
            [[*c, *(_cell(at.get((malloc, c, p)), "median_ms") for p in providers)] for c in cases],
            len(names),
        )
    if any(row["peak_mib"] for row in rows):
        of = [p for p in providers if p != "copy"]
        out += ["## Peak MiB above the inputs, results and gradients included, default malloc", ""]
        out += _table(
            [*names, *of],
            [[*c, *(_cell(at.get(("default", c, p)), "peak_mib") for p in of)] for c in cases],
            len(names),
        )
    refused = [row for row in rows if row["status"] != "ok"]
    if refused:
        out += ["## Not timed", ""]
        out += [
            f"- {row['provider']}, {row['malloc']} malloc, {', '.join(_key(row, names))}: "
            f"{row['status']}"
            for row in refused
        ]
        out.append("")
    return "\n".join(out)


def _unique_keys(rows: Sequence[Row], names: Sequence[str]) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(_key(row, names) for row in rows))


def _project(case: tuple[str, ...], names: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...]:
    return tuple(value for name, value in zip(names, case, strict=True) if name in wanted)


def _spread(values: Sequence[float], unit: str) -> str:
    if not values:
        return ""
    digits = 0 if unit == "%" else 1
    middle = statistics.median(values)
    return f"{middle:.{digits}f}{unit} ({min(values):.{digits}f} – {max(values):.{digits}f})"


def draw(rows: Sequence[Row], path: Path) -> None:
    """One panel for each mode and dtype, one group of bars for each shape; whiskers p20 to p80."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem  # the same CSV gives the same file
    import matplotlib.pyplot as plt

    malloc = _unique(row["malloc"] for row in rows)[-1]
    rows = [row for row in rows if row["malloc"] == malloc and row["median_ms"]]
    names = case_columns(rows)
    group = [name for name in GROUP if name in names]
    # A column that never changes says nothing below an axis.
    rest = [n for n in names if n not in group and len({row[n] for row in rows}) > 1]
    providers = [p for p in _unique(row["provider"] for row in rows) if p != "copy"]
    panels = _unique_keys(rows, group)
    bandwidth = bool(rows[-1]["pct_of_copy"])
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    figure, axes = plt.subplots(
        down, across, figsize=(6.5 * across, 2.9 * down + 1), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        inside = [row for row in rows if _key(row, group) == panel]
        shapes = _unique_keys(inside, rest)
        width = 0.85 / len(providers)
        for i, provider in enumerate(providers):
            bars = [
                (x + (i - (len(providers) - 1) / 2) * width, row)
                for x, shape in enumerate(shapes)
                for row in inside
                if row["provider"] == provider and _key(row, rest) == shape
            ]
            low, middle, high = (
                [float(row[column]) for _, row in bars]
                for column in ("p20_ms", "median_ms", "p80_ms")
            )
            if bandwidth:  # the shorter time is the higher bar
                share = [float(row["pct_of_copy"]) for _, row in bars]
                high, low = (
                    [s * m / t for s, m, t in zip(share, middle, times, strict=True)]
                    for times in (low, high)
                )
                middle = share
            whiskers = [
                [m - a for m, a in zip(middle, low, strict=True)],
                [b - m for m, b in zip(middle, high, strict=True)],
            ]
            axis.bar(
                [x for x, _ in bars],
                middle,
                width,
                yerr=whiskers,
                label=provider,
                color=f"C{i}",
                error_kw={"linewidth": 0.6},
            )
        axis.set_xticks(range(len(shapes)), ["\n".join(shape) for shape in shapes], fontsize=8)
        axis.set_title(" · ".join(part for part in panel if part != "none"), fontsize=10)
        if bandwidth:
            axis.axhline(100, color="black", linewidth=0.8, linestyle="--")
    for axis in axes[:, 0]:
        axis.set_ylabel("% of copy bandwidth" if bandwidth else "milliseconds")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    notes = ["higher is better" if bandwidth else "lower is better", f"{malloc} malloc"]
    if rest:
        notes.append(f"below each group: {', '.join(rest)}")
    figure.suptitle(f"{rows[0]['op']} ({'; '.join(notes)})", fontsize=11)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(*write(Path(argument)), sep="\n")
