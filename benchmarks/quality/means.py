"""Means over seeds, their errors, and what is compared by them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from benchmarks.quality.settings import ABLATIONS, PARENTS, SHARES
from benchmarks.quality.table import Run, of


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


def written(value: tuple[float, float], digits: int) -> str:
    """A mean and its error in a table; a dash for what diverged."""
    mean, error = value
    if not math.isfinite(mean):
        return "–"
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def by_mean(group: Sequence[Run]) -> tuple[bool, float]:
    """To sort by: the lowest mean first, runs that diverged last."""
    mean, _ = mean_and_error([run.bits_per_byte for run in group])
    return math.isnan(mean), mean


def changed(runs: Sequence[Run], recipe: str) -> list[str]:
    """The ablations of a recipe that have runs."""
    return [name for name in ABLATIONS if PARENTS[name] == recipe and of(runs, variant=name)]


def by_share(runs: Sequence[Run], variant: str) -> dict[float, float]:
    """Bits per byte on the dev split for each share of cross-entropy, at the variant's best rate;
    nothing until all were tried."""
    tried = of(runs, variant=variant, split="dev")
    for rate in sorted({run.learning_rate for run in tried}):
        found = {run.alpha: run.bits_per_byte for run in of(tried, learning_rate=rate)}
        if len(found) > len(SHARES):
            return dict(sorted(found.items()))
    return {}
