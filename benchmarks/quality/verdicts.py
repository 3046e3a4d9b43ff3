"""Whether the default recipe wins: a table for the page, a sentence for the README."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.quality.means import by_mean, difference, written
from benchmarks.quality.settings import MAIN, REGIMES, SEEDS, SETTINGS
from benchmarks.quality.table import Run, of
from sra.objective import DEFAULT

UNKNOWN = math.nan, math.nan


class Standing(NamedTuple):
    """The default recipe among the others, on one pair and amount of data.

    below: mean and error of what each other method has more, seed by seed.
    best: the other of the lowest mean.
    """

    setting: str
    regime: str
    below: dict[str, tuple[float, float]]
    best: str

    @property
    def level(self) -> list[str]:
        """Those within two standard errors of it."""
        return [x for x in self.below if not self._beyond(x, 1) and not self._beyond(x, -1)]

    @property
    def ahead_of_it(self) -> list[str]:
        return [x for x in self.below if self._beyond(x, -1)]

    def _beyond(self, name: str, sign: int) -> bool:
        mean, error = self.below[name]
        return sign * mean > 2 * error


def standings(runs: Sequence[Run]) -> list[Standing]:
    """Where the default recipe and others were measured by all seeds."""
    found = []
    for setting, regime in itertools.product(SETTINGS, REGIMES):
        here = of(runs, setting=setting, regime=regime, split="test")
        groups = {name: of(here, variant=name) for name in MAIN}
        groups = {name: group for name, group in groups.items() if len(group) >= len(SEEDS)}
        mine = groups.pop(DEFAULT, [])
        if mine and groups:
            best = min(groups, key=lambda name: by_mean(groups[name]))
            below = {name: _below(mine, group) for name, group in groups.items()}
            found.append(Standing(setting, regime, below, best))
    return found


def _below(mine: Sequence[Run], group: Sequence[Run]) -> tuple[float, float]:
    """`difference`, infinite where one of the two diverged."""
    diverged = [by_mean(runs)[0] for runs in (mine, group)]
    if diverged[0] != diverged[1]:
        return (-math.inf if diverged[0] else math.inf), 0.0
    return difference(mine, group)


def verdicts(runs: Sequence[Run]) -> str:
    """A row for each pair and amount of data."""
    found = standings(runs)
    if not found:
        return f"*`{DEFAULT}` has not been measured beside another method yet.*"
    lines = [
        f"| setting | others so far | `{DEFAULT}` below cross-entropy | best of the others "
        f"| `{DEFAULT}` below it | ahead of all of them |",
        "|---|---|---|---|---|---|",
    ]
    for standing in found:
        groups = {"behind": standing.ahead_of_it, "level with": standing.level}
        no = [f"{where} {', '.join(names)}" for where, names in groups.items() if names]
        title = f"{SETTINGS[standing.setting].title}: {REGIMES[standing.regime].title}"
        lines.append(
            f"| {title} | {len(standing.below)} of {len(MAIN) - 1} | "
            f"{written(standing.below.get('cross-entropy', UNKNOWN), 4)} | {standing.best} | "
            f"{written(standing.below[standing.best], 4)} | "
            f"{'no: ' + '; '.join(no) if no else 'yes'} |"
        )
    return "\n".join(lines)


def claim(runs: Sequence[Run]) -> str:
    """What the README says of the default recipe, in one sentence."""
    found = standings(runs)
    beside = [x.below["cross-entropy"][0] for x in found if "cross-entropy" in x.below]
    if not beside:
        return f"`{DEFAULT}` has not been measured beside cross-entropy yet"
    others = " to ".join(map(str, sorted({f(len(x.below) for x in found) for f in (min, max)})))
    behind = [x for x in found if x.ahead_of_it]
    level = [x for x in found if x.level and not x.ahead_of_it]
    ahead = [x for x in found if not x.level and not x.ahead_of_it]
    parts = [
        f"ahead of all that were measured there in {len(ahead)} (by more than two standard errors)"
    ]
    if level:
        parts.append(f"level with some in {len(level)}")
    if behind:
        names = sorted({name for x in behind for name in x.ahead_of_it})
        parts.append(f"behind {', '.join(names)} in {len(behind)}")
    pairs = len({x.setting for x in found})
    return (
        f"In {len(found)} comparisons on {pairs} pairs of models, each beside {others} other "
        f"methods and recipes, `{DEFAULT}` ends {min(beside):.2f} to {max(beside):.2f} bits per "
        f"byte below cross-entropy alone; it is {', '.join(parts)}"
    )
