"""The pictures of docs/evidence.md."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.means import by_mean, by_share, changed, difference, mean_and_error
from benchmarks.quality.settings import MAIN, OURS, REGIMES, SETTINGS
from benchmarks.quality.table import Run, of

COLOR, OUR_COLOR = "#475569", "#c2410c"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sra"  # the same picture for the same runs
    from matplotlib import pyplot

    return pyplot


def _point(panel: Any, mean: float, error: float, row: int, color: str) -> None:
    """A mean with two standard errors on either side."""
    panel.errorbar(
        mean, row, xerr=0 if math.isnan(error) else 2 * error, fmt="o", capsize=3, color=color
    )


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    _pyplot().close(figure)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Mean and two standard errors of each method, a panel for each regime."""
    pyplot = _pyplot()
    regimes = [name for name in REGIMES if of(runs, regime=name)]
    figure, panels = pyplot.subplots(1, len(regimes), figsize=(5 * len(regimes), 4), squeeze=False)
    for panel, regime in zip(panels[0], regimes, strict=True):
        groups = {name: of(runs, regime=regime, variant=name) for name in MAIN}
        known = {n: g for n, g in groups.items() if g and not math.isnan(by_mean(g)[1])}
        order = sorted(known, key=lambda name: by_mean(known[name]), reverse=True)
        for row, name in enumerate(order):
            mean, error = mean_and_error([run.bits_per_byte for run in known[name]])
            _point(panel, mean, error, row, OUR_COLOR if name in OURS else COLOR)
        panel.set_yticks(range(len(order)), order)
        panel.set_title(REGIMES[regime].title, fontsize=10)
        panel.set_xlabel("held-out bits per byte (less is better)")
        panel.grid(axis="x", alpha=0.3)
    _save(figure, path)


def draw_ablations(runs: Sequence[Run], path: Path) -> bool:
    """What each change to a recipe does, with two standard errors, a panel for each recipe, setting
    and regime; False, and no picture, if there is none."""
    cells = [
        (recipe, setting, regime, found)
        for recipe, setting, regime in itertools.product(MAIN, SETTINGS, REGIMES)
        if changed(found := of(runs, setting=setting, regime=regime), recipe)
    ]
    if not cells:
        return False
    pyplot = _pyplot()
    heights = [len(changed(found, recipe)) + 2 for recipe, _, _, found in cells]
    figure, panels = pyplot.subplots(
        len(cells), 1, figsize=(7, 0.28 * sum(heights) + 0.5 * len(cells)), squeeze=False,
        height_ratios=heights,
    )  # fmt: skip
    for panel, (recipe, setting, regime, found) in zip(panels[:, 0], cells, strict=True):
        names = changed(found, recipe)[::-1]
        for row, name in enumerate(names):
            mean, error = difference(of(found, variant=name), of(found, variant=recipe))
            _point(panel, -mean, error, row, COLOR)
        panel.axvline(0, color=OUR_COLOR, linewidth=1)
        panel.set_yticks(range(len(names)), [name.removeprefix(f"{recipe}: ") for name in names])
        panel.set_ylim(-0.7, len(names) - 0.3)
        panel.set_title(f"{recipe}, {SETTINGS[setting].title}: {regime}", fontsize=10)
        panel.grid(axis="x", alpha=0.3)
    panels[-1][0].set_xlabel("bits per byte more than the recipe (left of the line is better)")
    _save(figure, path)
    return True


def draw_shares(runs: Sequence[Run], path: Path) -> bool:
    """How much each method minds its share of cross-entropy, a panel for each setting and regime;
    False, and no picture, if no method was tried at all shares in any."""
    cells = [
        (setting, regime, found)
        for setting, regime in itertools.product(SETTINGS, REGIMES)
        if any(by_share(found := of(runs, setting=setting, regime=regime), name) for name in MAIN)
    ]
    if not cells:
        return False
    pyplot = _pyplot()
    columns = min(len(cells), 2)
    rows = math.ceil(len(cells) / columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(4 * columns + 2, 3.2 * rows), squeeze=False
    )
    colors = dict(zip(MAIN, pyplot.get_cmap("tab20").colors, strict=False))
    curves = {}
    for panel in panels.flat[len(cells) :]:
        panel.set_visible(False)
    for panel, (setting, regime, found) in zip(panels.flat, cells, strict=False):
        for name in MAIN:
            if curve := by_share(found, name):
                own = name in OURS
                curves[name], = panel.plot(
                    [*curve], [*curve.values()], marker="o", markersize=3, color=colors[name],
                    linewidth=2.5 if own else 1,
                )  # fmt: skip
        panel.set_title(f"{SETTINGS[setting].title}: {regime}", fontsize=10)
        panel.set_xlabel("share of cross-entropy, alpha")
        panel.grid(alpha=0.3)
        panel.set_ylabel("dev bits per byte, at the best rate", fontsize=8)
    names = [name for name in MAIN if name in curves]
    figure.legend(
        [curves[name] for name in names], names, fontsize=8, loc="center left",
        bbox_to_anchor=(1, 0.5),
    )  # fmt: skip
    _save(figure, path)
    return True
