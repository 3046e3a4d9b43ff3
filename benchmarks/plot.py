"""The CSVs, and nothing else, become tables, pictures and the README's figures.

`python -m benchmarks.plot` remakes those of benchmarks/results and the block in README.md;
`python -m benchmarks.plot CSV ...` what stands beside each CSV.
"""

from __future__ import annotations

import csv
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.readme import replace_block
from benchmarks.registry import NAMES

Row = dict[str, str]

# The columns that a measurement fills; those between `provider` and `malloc` describe the case.
MEASURED = (
    "median_ms",
    "p20_ms",
    "p80_ms",
    "min_ms",
    "samples",
    "gb_per_s",
    "gflop_per_s",
    "bound",
    "pct_of_roofline",
    "peak_mib",
    "first_ms",
    "error_vs_float64",
    "status",
)
# What the tables say of a case beside its name; the shape's numbers are in the CSV.
HOW = ("mode", "grads", "head", "dtype", "direction", "outside", "window", "padding")
OURS = "ours"
LINES = ("copy", "GEMM")  # they make the roofline, and are no bars
QUOTED = "default"  # the malloc that people have
RESULTS = Path(__file__).with_name("results")
README = Path(__file__).parents[1] / "README.md"

ROOFLINE = (
    "*Of the roofline*: the time that the slower of memory and arithmetic needs at least, over the "
    "median. Memory: the bytes that any implementation must read and write once, at the rate of a "
    "`torch.Tensor.copy_` that moves as many (at most 256 MiB) between buffers that are mapped "
    "already. Arithmetic: its multiplications and additions, causal ones counted half, at the rate "
    "of a `torch.mm` ([1024]³ in float32 on a CPU, [8192]³ in bfloat16 on a GPU). Both are "
    "measured in the same turns. Exponentials are not counted, a copy is half writes, which cost "
    "more than reads, and under the default malloc every result is fresh memory, which the copy is "
    "spared: so some ops cannot reach 100 %, and one that mostly reads can pass it."
)


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path) -> tuple[Path, Path]:
    """Writes the Markdown table and the picture beside the CSV."""
    rows = read(path)
    table, picture = path.with_suffix(".md"), path.with_suffix(".svg")
    table.write_text(markdown(rows, picture.name))
    draw(rows, picture)
    return table, picture


def case_columns(rows: Sequence[Row]) -> list[str]:
    names = list(rows[0])
    return names[names.index("provider") + 1 : names.index("malloc")]


def shown_columns(rows: Sequence[Row]) -> list[str]:
    """The case's name and what varies of how it is run; without a name, all that varies."""
    names = case_columns(rows)
    varying = [name for name in names if len({row[name] for row in rows}) > 1]
    if "case" not in names:
        return varying or names[:1]
    return ["case", *(name for name in varying if name in HOW)]


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _key(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(row[name] for name in names)


def _cases(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each case, in the CSV's order."""
    names = case_columns(rows)
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(_key(row, names), []).append(row)
    return list(cases.values())


def _of(case: Sequence[Row], provider: str) -> Row | None:
    return next((row for row in case if row["provider"] == provider and row["median_ms"]), None)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(head: Sequence[str], lines: Iterable[Sequence[str]], words: int) -> list[str]:
    """Markdown; the first `words` columns are text, the others numbers."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return [_line(head), _line(rule), *map(_line, lines), ""]


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(mine: Row | None, other: Row | None) -> str:
    """How many times as long the other takes."""
    if mine is None or other is None:
        return ""
    return f"{number(float(other['median_ms']) / float(mine['median_ms']))}×"


def machine(row: Row) -> str:
    changes = " with changes" if int(row["dirty"]) else ""
    on = row.get("gpu") or f"{row['cpu']}, {row['threads']} threads"
    return (
        f"{on}; torch {row['torch']}, Python {row['python']}; "
        f"commit {row['commit']}{changes}, {row['timestamp'][:10]}"
    )


def markdown(rows: Sequence[Row], picture: str) -> str:
    op, shown = rows[0]["op"], shown_columns(rows)
    timed = [row for row in rows if row["median_ms"] and row["provider"] not in LINES]
    providers = _unique(row["provider"] for row in timed if row["kind"] != "bound")
    others = [p for p in _unique(row["provider"] for row in timed) if p != OURS]
    packages = ", ".join(sorted(_unique(row["package"] for row in rows if row["package"])))
    out = [
        f"# {op}",
        "",
        f"{machine(rows[0])}{f'; {packages}' if packages else ''}. Written by `sra bench` from "
        f"`{op}.csv`, where every case has its full shape.",
        "",
        f"![{op}]({picture})",
        "",
    ]
    for malloc in _unique(row["malloc"] for row in rows):
        cases = _cases([row for row in rows if row["malloc"] == malloc])
        out += [f"## Times, {malloc} malloc", ""]
        out += ["Ours in milliseconds (median, p20 – p80), the others in times as long.", ""]
        out += table(
            [*shown, "ours", "of the roofline", "bound", *others],
            [
                [*_key(case[0], shown), *_ours(mine), *(times(mine, _of(case, p)) for p in others)]
                for case in cases
                for mine in [_of(case, OURS)]
            ],
            len(shown),
        )
    if any(row["pct_of_roofline"] for row in rows):
        out += [ROOFLINE, ""]

    quoted = _cases([row for row in rows if row["malloc"] == QUOTED])
    for column, title in (
        ("peak_mib", "Peak MiB above the inputs, results and gradients included"),
        ("error_vs_float64", "Largest error against float64, relative to each row"),
    ):
        filled = [case for case in quoted if any(row[column] for row in case)]
        if filled:
            out += [f"## {title}", ""]
            out += table(
                [*shown, *providers],
                [
                    [*_key(case[0], shown), *(_cell(_of(case, p), column) for p in providers)]
                    for case in filled
                ],
                len(shown),
            )
    absent = Counter(
        (row["provider"], row["status"]) for row in rows if row["status"] not in ("ok", "")
    )
    if absent:
        out += ["## Not timed", ""]
        out += [
            f"- {provider}, {count} case{'s' * (count > 1)}: {status}"
            for (provider, status), count in absent.items()
        ]
        out.append("")
    return "\n".join(out)


def _ours(mine: Row | None) -> list[str]:
    if mine is None:
        return ["", "", ""]
    low, middle, high = (number(float(mine[c])) for c in ("p20_ms", "median_ms", "p80_ms"))
    share = f"{float(mine['pct_of_roofline']):.0f} %" if mine["pct_of_roofline"] else ""
    return [f"{middle} ({low} – {high})", share, mine["bound"]]


def _cell(row: Row | None, column: str) -> str:
    return number(float(row[column])) if row and row[column] else ""


def readme(results: Sequence[Sequence[Row]]) -> str:
    """The quoted cases of every op, those whose memory is measured, ours beside the best rival."""
    lines, absent = [], []
    for rows in results:
        shown = shown_columns(rows)
        quoted = [row for row in rows if row["malloc"] == QUOTED]
        absent += [row["provider"] for row in quoted if row["status"].startswith("not installed")]
        for case in _cases(quoted):
            mine = _of(case, OURS)
            if mine is None or not mine["peak_mib"]:
                continue
            name = ", ".join(part for part in _key(mine, shown) if part not in ("none", "0"))
            ms = f"{number(float(mine['median_ms']))} ms"
            share = f"{float(mine['pct_of_roofline']):.0f} %" if mine["pct_of_roofline"] else ""
            rivals = [row for row in case if row["kind"] == "rival" and row["median_ms"]]
            best = min(rivals, key=lambda row: float(row["median_ms"]), default=None)
            against = [best["provider"] if best else "", times(mine, best), _memory(mine, best)]
            lines.append([mine["op"], name, ms, share, *against])
    out = table(
        ["op", "case", "ours", "of the roofline", "best rival", "takes", "in memory"], lines, 2
    )
    links = ", ".join(
        f"[{rows[0]['op']}](benchmarks/results/{rows[0]['op']}.md)" for rows in results
    )
    out.append(
        f"{machine(results[0][0])}. Default malloc, medians of interleaved runs, each provider "
        "checked against float64 first. *Best rival*: the fastest of eager torch, `torch.compile` "
        "and other libraries; *takes* and *in memory*: its time and its peak memory above the "
        f"inputs, in times ours. Every case and rival: {links}."
    )
    if absent:
        out.append(f"Not installed when this was measured: {', '.join(_unique(absent))}.")
    return "\n".join(out)


def _memory(mine: Row, best: Row | None) -> str:
    """Ours below 1 MiB counts as 1 MiB: pages and threads are measured there, not the op."""
    if best is None or not best["peak_mib"]:
        return ""
    floor = max(float(mine["peak_mib"]), 1.0)
    more = "> " if floor > float(mine["peak_mib"]) else ""
    return f"{more}{number(max(float(best['peak_mib']), 1.0) / floor)}×"


def rewrite_readme(path: Path, results: Path) -> None:
    """Replaces its table."""
    paths = [results / f"{name}.csv" for name in NAMES]
    replace_block(path, "benchmarks", readme([read(path) for path in paths if path.exists()]))


def draw(rows: Sequence[Row], path: Path) -> None:
    """One panel a case, one bar a provider; whiskers from p20 to p80, the roofline dashed."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem  # the same CSV gives the same file
    import matplotlib.pyplot as plt

    shown = shown_columns(rows)
    timed = [row for row in rows if row["median_ms"] and row["provider"] not in LINES]
    drawn = [row for row in timed if row["malloc"] == QUOTED]
    cases = _cases(drawn)
    colours = {p: f"C{i}" for i, p in enumerate(_unique(row["provider"] for row in drawn))}
    across = min(3, len(cases))
    down = math.ceil(len(cases) / across)
    bars = max(len(case) for case in cases)
    figure, axes = plt.subplots(
        down,
        across,
        figsize=(5.2 * across, (0.28 * bars + 0.9) * down + 0.4),
        squeeze=False,
        layout="constrained",
    )
    for axis, case in zip(axes.flat, cases, strict=False):
        middle, low, high = (
            [float(row[column]) for row in case] for column in ("median_ms", "p20_ms", "p80_ms")
        )
        axis.barh(
            [row["provider"] for row in case],
            middle,
            xerr=[_less(middle, low), _less(high, middle)],
            color=[colours[row["provider"]] for row in case],
            error_kw={"linewidth": 0.8},
        )
        for y, (value, end) in enumerate(zip(middle, high, strict=True)):
            axis.annotate(f" {number(value)}", (max(value, end), y), va="center", fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.tick_params(labelsize=8)
        share = case[0]["pct_of_roofline"]
        if share:
            axis.axvline(middle[0] * float(share) / 100, color="black", lw=0.8, ls="--")
        name, *how = _key(case[0], shown)
        how = [part for part in how if part not in ("none", "0")]
        axis.set_title("\n".join([name, " · ".join(how)] if how else [name]), fontsize=9)
    for axis in axes.flat[len(cases) :]:
        axis.set_axis_off()
    figure.suptitle(
        f"{rows[0]['op']}: milliseconds, lower is better; dashed: the roofline; {QUOTED} malloc",
        fontsize=11,
    )
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _less(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


if __name__ == "__main__":
    for path in [Path(argument) for argument in sys.argv[1:]] or sorted(RESULTS.glob("*.csv")):
        print(*write(path), sep="\n")
    if not sys.argv[1:]:
        rewrite_readme(README, RESULTS)
