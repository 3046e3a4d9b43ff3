"""docs/evidence.md and its pictures, from the CSV and nothing else."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.settings import (
    ABLATIONS,
    BATCH,
    FINER,
    MAIN,
    MAX_TOKENS,
    OURS,
    RATES,
    REGIMES,
    SEEDS,
    SETTINGS,
    SHARES,
    TEST,
)
from benchmarks.quality.table import Run, of

DOCS = Path(__file__).parents[2] / "docs"
PAGE, TEXT = DOCS / "evidence.md", Path(__file__).with_name("evidence.md")
COLUMNS = (  # field, title, decimals
    ("bits_per_byte", "bits per byte", 4),
    ("agreement", "agreement", 3),
    ("rouge_l", "ROUGE-L", 1),
    ("other_bits_per_byte", "other language", 3),
    ("seconds_a_step", "s a step", 2),
    ("peak_gib", "GiB", 1),
)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and the standard error of it; NaN for less than two values."""
    if not values or any(map(math.isnan, values)):
        return math.nan, math.nan
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, statistics.stdev(values) / math.sqrt(len(values))


def difference(ours: Sequence[Run], theirs: Sequence[Run]) -> tuple[float, float]:
    """Mean of theirs - ours in bits per byte, seed by seed, and its standard error."""
    own = {run.seed: run.bits_per_byte for run in ours}
    pairs = [run.bits_per_byte - own[run.seed] for run in theirs if run.seed in own]
    return mean_and_error(pairs)


def tables(runs: Sequence[Run], settings: Sequence[str], regimes: Sequence[str]) -> str:
    """A table for each setting and regime that has runs, best first."""
    parts = []
    for setting in settings:
        for regime in regimes:
            found = of(runs, setting=setting, regime=regime, split="test")
            if found:
                title = f"{SETTINGS[setting].title}: {REGIMES[regime].title}"
                parts.append(f"### {title}\n\n{_table(found, [*MAIN])}")
                if of_ablations := [run for run in found if run.variant in ABLATIONS]:
                    names = ["cross-entropy", *OURS, *ABLATIONS]
                    parents = [run for run in found if run.variant in names[: 1 + len(OURS)]]
                    both = [*of_ablations, *parents]
                    parts.append(f"#### Ablations\n\n{_table(both, names)}")
    return "\n\n".join(parts)


def _table(runs: Sequence[Run], variants: Sequence[str]) -> str:
    groups = {name: of(runs, variant=name) for name in variants}
    groups = {name: group for name, group in groups.items() if group}
    reference = groups.get("cross-entropy", [])
    order = sorted(groups, key=lambda name: _key(groups[name]))
    titles = [title for _, title, _ in COLUMNS]
    lines = [
        "| method | " + " | ".join(titles) + " | below cross-entropy | rate | alpha | seeds |",
        "|---|" + "---|" * (len(titles) + 4),
    ]
    for name in order:
        group = groups[name]
        cells = [
            _cell(mean_and_error([getattr(run, field) for run in group]), digits)
            for field, _, digits in COLUMNS
        ]
        less = "" if name == "cross-entropy" else _cell(difference(group, reference), 4)
        chosen = group[0]
        alpha = f"{chosen.alpha:g}" if MAIN.get(name, {}).get("recipe") != "cross-entropy" else ""
        lines.append(
            f"| {name} | {' | '.join(cells)} | {less} | {chosen.learning_rate:g} | {alpha} | "
            f"{len(group)} |"
        )
    return "\n".join(lines)


def _key(group: Sequence[Run]) -> tuple[bool, float]:
    mean, _ = mean_and_error([run.bits_per_byte for run in group])
    return math.isnan(mean), mean


def _cell(value: tuple[float, float], digits: int) -> str:
    mean, error = value
    if math.isnan(mean):
        return "–"
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def verdicts(runs: Sequence[Run]) -> str:
    """Where a recipe of ours is below every other method by two standard errors, and where not."""
    lines = ["| setting | methods so far | best of ours | next best | difference | beyond two "
             "standard errors |", "|---|---|---|---|---|---|"]  # fmt: skip
    for setting in SETTINGS:
        for regime in REGIMES:
            found = of(runs, setting=setting, regime=regime, split="test")
            groups = {name: of(found, variant=name) for name in MAIN}
            mine = {name: groups[name] for name in OURS if groups[name]}
            rest = {n: g for n, g in groups.items() if g and n not in OURS}
            if not mine or not rest:
                continue
            best = min(mine, key=lambda name: _key(mine[name]))
            rival = min(rest, key=lambda name: _key(rest[name]))
            mean, error = difference(mine[best], rest[rival])
            sure = not math.isnan(error) and mean > 2 * error
            title = f"{SETTINGS[setting].title}: {REGIMES[regime].title}"
            lines.append(
                f"| {title} | {len(mine) + len(rest)} of {len(MAIN)} | {best} | {rival} | "
                f"{_cell((mean, error), 4)} | "
                f"{'yes' if sure else 'no'} |"
            )
    if len(lines) == 2:
        return "*No recipe of ours has been measured beside another method yet.*"
    return "\n".join(lines)


def write(runs: Sequence[Run]) -> None:
    """docs/evidence.md: the text of benchmarks/quality/evidence.md with the tables in it."""
    pictures = []
    for setting in SETTINGS:
        found = of(runs, setting=setting, split="test")
        if len({run.variant for run in found} & {*MAIN}) > 1:
            file = f"evidence-{setting}.svg"
            draw(found, DOCS / file)
            pictures.append(f"![{SETTINGS[setting].title}]({file})")
    facts = {
        "rows": f"{TEST}", "batch": f"{BATCH}", "max_tokens": f"{MAX_TOKENS}",
        "rates": ", ".join(f"{rate:g}" for rate in RATES),
        "shares": ", ".join(f"{share:g}" for share in SHARES),
        "finer": " and ".join(f"{factor:g}" for factor in FINER),
        "seeds": f"{len(SEEDS)}", "runs": f"{len(runs):,}",
        "regimes": "; ".join(f"{r.title}: {r.rows} rows, {r.steps} steps"
                             for r in REGIMES.values()),
        "verdicts": verdicts(runs), "pictures": "\n\n".join(pictures),
        "tables": tables(runs, [*SETTINGS], [*REGIMES]),
    }  # fmt: skip
    text = TEXT.read_text()
    for name, value in facts.items():
        text = text.replace("{" + name + "}", value)
    PAGE.write_text(text.rstrip() + "\n")


def draw(runs: Sequence[Run], path: Path) -> None:
    """Mean and two standard errors of each method, a panel for each regime."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sra"  # the same picture for the same runs
    from matplotlib import pyplot

    regimes = [name for name in REGIMES if of(runs, regime=name)]
    figure, panels = pyplot.subplots(1, len(regimes), figsize=(5 * len(regimes), 4), squeeze=False)
    for panel, regime in zip(panels[0], regimes, strict=True):
        groups = {name: of(runs, regime=regime, variant=name) for name in MAIN}
        known = {n: g for n, g in groups.items() if g and not math.isnan(_key(g)[1])}
        order = sorted(known, key=lambda name: _key(known[name]), reverse=True)
        for row, name in enumerate(order):
            mean, error = mean_and_error([run.bits_per_byte for run in known[name]])
            panel.errorbar(
                mean, row, xerr=0 if math.isnan(error) else 2 * error, fmt="o", capsize=3,
                color="#c2410c" if name in OURS else "#475569",
            )  # fmt: skip
        panel.set_yticks(range(len(order)), order)
        panel.set_title(REGIMES[regime].title, fontsize=10)
        panel.set_xlabel("held-out bits per byte (less is better)")
        panel.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
