"""docs/evidence.md, its pictures and the README's claim, from the CSV and nothing else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.gradients import TERMS, Pull
from benchmarks.quality.grid import at_chosen
from benchmarks.quality.means import by_mean, changed, difference, mean_and_error, written
from benchmarks.quality.pictures import draw, draw_ablations, draw_shares
from benchmarks.quality.settings import (
    ABLATIONS,
    ANSWER,
    ANSWERED,
    BATCH,
    BETA2,
    BOUNDS,
    FINER,
    MAIN,
    MAX_TOKENS,
    REGIMES,
    SEEDS,
    SETTINGS,
    SHARES,
    TEST,
    TRIES,
    UNTRAINED,
    WARMUP,
    has_share,
)
from benchmarks.quality.table import Run, of
from benchmarks.quality.verdicts import claim, verdicts
from benchmarks.readme import replace_block

DOCS, README = (Path(__file__).parents[2] / name for name in ("docs", "README.md"))
PAGE, TEXT = DOCS / "evidence.md", Path(__file__).with_name("evidence.md")
COLUMNS = (  # field, title, decimals
    ("bits_per_byte", "bits per byte", 4),
    ("agreement", "agreement", 3),
    ("rouge_l", "ROUGE-L", 1),
    ("other_bits_per_byte", "other language", 3),
)


def tables(runs: Sequence[Run], settings: Sequence[str], regimes: Sequence[str]) -> str:
    """A table for each setting and regime that has runs, best first."""
    parts = []
    for setting in settings:
        for regime in regimes:
            found = of(runs, setting=setting, regime=regime, split="test")
            if found:
                title = f"{SETTINGS[setting].title}: {REGIMES[regime].title}"
                between = of(runs, setting=setting, regime=UNTRAINED.name)
                parts.append(f"### {title}\n\n{_table([*found, *between], [*MAIN, *BOUNDS])}")
                if any(run.variant in ABLATIONS for run in found):
                    parts.append(f"#### Ablations\n\n{_ablations(found)}")
    return "\n\n".join(parts)


def _table(runs: Sequence[Run], variants: Sequence[str]) -> str:
    groups = {name: of(runs, variant=name) for name in variants}
    groups = {name: group for name, group in groups.items() if group}
    reference = groups.get("cross-entropy", [])
    order = sorted(groups, key=lambda name: by_mean(groups[name]))
    titles = [title for _, title, _ in COLUMNS]
    lines = [
        "| method | " + " | ".join(titles) + " | below cross-entropy | rate | alpha | seeds |",
        "|---|" + "---|" * (len(titles) + 4),
    ]
    for name in [*(x for x in order if x not in BOUNDS), *(x for x in BOUNDS if x in groups)]:
        group = groups[name]
        cells = _measures(group)
        if name in BOUNDS:
            lines.append(f"| {BOUNDS[name]} | {cells} |  |  |  |  |")
            continue
        less = "" if name == "cross-entropy" else written(difference(group, reference), 4)
        chosen = group[0]
        alpha = f"{chosen.alpha:g}" if has_share(name) else ""
        lines.append(
            f"| {name} | {cells} | {less} | {chosen.learning_rate:g} | {alpha} | {len(group)} |"
        )
    return "\n".join(lines)


def _ablations(runs: Sequence[Run]) -> str:
    """Each recipe, and below it what changes when something of it is changed."""
    titles = [title for _, title, _ in COLUMNS]
    lines = [
        "| recipe, change | " + " | ".join(titles) + " | below its recipe | seeds |",
        "|---|" + "---|" * (len(titles) + 2),
    ]
    for parent in MAIN:
        children = changed(runs, parent)
        for name in (parent, *children) if children else ():
            group = of(runs, variant=name)
            less = "" if name == parent else written(difference(group, of(runs, variant=parent)), 4)
            title = f"**{name}**" if name == parent else name
            lines.append(f"| {title} | {_measures(group)} | {less} | {len(group)} |")
    return "\n".join(lines)


def _measures(group: Sequence[Run]) -> str:
    """The cells of `COLUMNS`."""
    return " | ".join(
        written(mean_and_error([getattr(run, field) for run in group]), digits)
        for field, _, digits in COLUMNS
    )


def costs(runs: Sequence[Run]) -> str:
    """Seconds a step and the peak of memory of each method that was timed, by setting."""
    settings = [name for name in SETTINGS if of(runs, setting=name)]
    if not settings:
        return "*Not measured yet.*"
    titles = [f"{SETTINGS[name].title}: {unit}" for name in settings for unit in ("s", "GiB")]
    lines = ["| method | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    for variant in (name for name in MAIN if of(runs, variant=name)):
        cells = []
        for setting in settings:
            found = of(runs, setting=setting, variant=variant)
            cells.append(written(mean_and_error([run.seconds_a_step for run in found]), 2))
            cells.append(written(mean_and_error([run.peak_gib for run in found]), 1))
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def overview(runs: Sequence[Run]) -> str:
    """Bits per byte of every method in every setting and regime that has runs; the best in bold."""
    columns = []
    for setting, regime in itertools.product(SETTINGS, REGIMES):
        found = of(runs, setting=setting, regime=regime, split="test")
        groups = {name: _bits(of(found, variant=name)) for name in MAIN}
        if any(values for values in groups.values()):
            columns.append((setting, regime, groups))
    if not columns:
        return "*Nothing has been measured yet.*"
    titles = [f"{SETTINGS[setting].title}: {regime}" for setting, regime, _ in columns]
    lines = ["| method | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    for name in MAIN:
        cells = []
        for _, _, groups in columns:
            means = [mean_and_error(values)[0] for values in groups.values()]
            least = min((mean for mean in means if not math.isnan(mean)), default=math.nan)
            cell = written(mean_and_error(groups[name]), 3)
            if mean_and_error(groups[name])[0] == least:
                mean, *error = cell.split(" ", 1)
                cell = " ".join([f"**{mean}**", *error])
            cells.append(cell)
        if set(cells) != {"–"}:
            lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, title in BOUNDS.items():
        bound = [_bits(of(runs, setting=setting, variant=name)) for setting, _, _ in columns]
        if any(bound):
            cells = [written(mean_and_error(values), 3) for values in bound]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _bits(runs: Sequence[Run]) -> list[float]:
    return [run.bits_per_byte for run in runs]


def pulls_table(pulls: Sequence[Pull]) -> str:
    """Norm and cosine of each term's gradient, by setting and student."""
    if not pulls:
        return "*Not measured yet.*"
    columns = [*dict.fromkeys((pull.setting, pull.student) for pull in pulls)]
    titles = [f"{SETTINGS[setting].title}, {student}" for setting, student in columns]
    lines = ["| term | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    for term in (term for term in TERMS if any(pull.term == term for pull in pulls)):
        found = {(pull.setting, pull.student): pull for pull in pulls if pull.term == term}
        cells = [
            f"{found[key].norm:,.{0 if found[key].norm >= 100 else 2}f}; {found[key].cosine:.2f}"
            if key in found
            else "–"
            for key in columns
        ]
        lines.append(f"| {term} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _listed(values: Sequence[float]) -> str:
    *most, last = (f"{value:g}" for value in values)
    return f"{', '.join(most)} and {last}"


def write(runs: Sequence[Run], pulls: Sequence[Pull] = ()) -> None:
    """docs/evidence.md: the text of benchmarks/quality/evidence.md with the tables in it; and the
    README's sentence."""
    count, runs = len(runs), at_chosen(runs)
    pictures = []
    for setting in SETTINGS:
        found = of(runs, setting=setting, split="test")
        if len({run.variant for run in found} & {*MAIN}) > 1:
            file = f"evidence-{setting}.svg"
            draw(found, DOCS / file)
            pictures.append(f"![{SETTINGS[setting].title}]({file})")
    if draw_ablations(of(runs, split="test"), DOCS / "evidence-ablations.svg"):
        pictures.append("![What a change to a recipe does](evidence-ablations.svg)")
    if draw_shares(runs, DOCS / "evidence-shares.svg"):
        pictures.append("![The share of cross-entropy](evidence-shares.svg)")
    facts = {
        "rows": f"{TEST}", "batch": f"{BATCH}", "max_tokens": f"{MAX_TOKENS}",
        "rates": _listed(SETTINGS["prune-qwen"].rates),
        "chinese_rates": _listed(SETTINGS["chinese"].rates),
        "tries": f"{TRIES}", "answer": f"{ANSWER}", "answered": f"{ANSWERED}",
        "beta2": f"{BETA2:g}", "warmup": f"1/{WARMUP}",
        "shares": _listed(SHARES), "finer": _listed(FINER),
        "seeds": f"{len(SEEDS)}", "runs": f"{count:,}",
        "regimes": "; ".join(f"{r.title}: {r.rows} rows, {r.steps} steps"
                             for r in REGIMES.values()),
        "verdicts": verdicts(runs), "overview": overview(runs),
        "pictures": "\n\n".join(pictures),
        "pulls": pulls_table(pulls),
        "costs": costs(of(runs, split="speed")),
        "tables": tables(runs, [*SETTINGS], [*REGIMES]),
    }  # fmt: skip
    text = TEXT.read_text()
    for name, value in facts.items():
        text = text.replace("{" + name + "}", value)
    PAGE.write_text(text.rstrip() + "\n")
    replace_block(README, "evidence", f"{claim(runs)} ([docs/evidence.md](docs/evidence.md)).")
