"""What is tried of each method on the dev split, and what that chooses."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.quality.settings import (
    FINER,
    PARENTS,
    REGIMES,
    SETTINGS,
    SHARES,
    TRIES,
    has_share,
)
from benchmarks.quality.table import Run, of


def best(runs: Sequence[Run]) -> Run:
    """The lowest bits per byte; runs that diverged last."""
    return min(runs, key=lambda run: (math.isnan(run.bits_per_byte), run.bits_per_byte))


def tries(variant: str, rates: Sequence[float], tried: Sequence[Run]) -> list[tuple[float, float]]:
    """Pairs of learning rate and share to try, as far as they are known: the two rates in the
    middle, the one beyond the better of them, and, at the best, other shares or finer rates."""
    middle = [*rates[1:3]]
    known = {run.learning_rate: run for run in tried if run.alpha == 0.5}
    if all(rate in known for rate in middle):
        lower = best([known[rate] for rate in middle]).learning_rate == middle[0]
        middle.append(rates[0] if lower else rates[3])
    first = [(rate, 0.5) for rate in middle]
    if len(first) < 3 or middle[2] not in known:
        return first
    top = best([known[rate] for rate in middle]).learning_rate
    if has_share(variant):
        return first + [(top, share) for share in SHARES]
    return first + [(float(f"{top * factor:g}"), 0.5) for factor in FINER]


def chosen(
    variant: str, rates: Sequence[float], tried: Sequence[Run]
) -> tuple[float, float] | None:
    """The best of all tries; None while some are missing."""
    wanted = tries(variant, rates, tried)
    found = [run for run in tried if (run.learning_rate, run.alpha) in wanted]
    if len(found) < TRIES:
        return None
    return best(found).learning_rate, best(found).alpha


def at_chosen(runs: Sequence[Run]) -> list[Run]:
    """Without what was tested at other options than dev has chosen, or before it had chosen."""
    choices: dict[tuple[str, str, str], tuple[float, float] | None] = {}
    kept = []
    for run in runs:
        if run.split == "test" and run.regime in REGIMES:
            on, parent = SETTINGS[run.setting].tuned_on, PARENTS.get(run.variant, run.variant)
            key = on, run.regime, parent
            if key not in choices:
                tried = of(runs, setting=on, regime=run.regime, variant=parent, split="dev")
                choices[key] = chosen(parent, SETTINGS[on].rates, tried)
            if choices[key] != (run.learning_rate, run.alpha):
                continue
        kept.append(run)
    return kept
