"""Line charts of a training log as inline SVG."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
MAX_POINTS = 300
SMOOTHED_FROM = 25  # fewer points are drawn as they are


@dataclass(frozen=True)
class Curve:
    """One quantity over the steps of a run.

    points: (step, value), all finite.
    levels: (name, value) of horizontal lines to compare with.
    """

    title: str
    note: str
    points: Sequence[tuple[int, float]]
    levels: Sequence[tuple[str, float]] = field(default=())


def draw(curve: Curve) -> str:
    """The curve as an `<svg>`, with its points in `data-points` for whoever reads it by pointer.

    A long, noisy curve is drawn faintly, with its moving mean over it.
    """
    points = thinned(curve.points)
    values = [value for _, value in points] + [value for _, value in curve.levels]
    low, high, ticks = _axis(min(values), max(values))
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = []
    for tick in ticks:
        level = f"{y(tick):.1f}"
        ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level}" y2="{level}"'
        parts.append(f'<line class="grid" {ends}/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{level}" dy="4" text-anchor="end">'
            f"{number(tick)}</text>"
        )
    for step in _steps(first, points[-1][0]):
        parts.append(
            f'<text class="tick" x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="middle">'
            f"{step:,}</text>"
        )
    for index, (name, value) in enumerate(curve.levels):
        at = y(value)
        parts.append(
            f'<line class="level level{index}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" '
            f'y2="{at:.1f}"/>'
            f'<text class="label level{index}" x="{WIDTH - RIGHT - 2}" '
            f'y="{at - 4 if at > TOP + 14 else at + 13:.1f}" text-anchor="end">{escape(name)} '
            f"{number(value)}</text>"
        )
    noisy = len(points) >= SMOOTHED_FROM
    place = [(x(step), y(value)) for step, value in points]
    parts.append(_line(place, "raw" if noisy else "line"))
    if noisy:
        smooth = smoothed([value for _, value in points])
        shown = [(x(step), y(value)) for (step, _), value in zip(points, smooth, strict=True)]
        parts.append(_line(shown, "line"))
    if len(points) <= 12:
        parts += [f'<circle class="dot" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in place]
    listed = [
        [step, float(f"{value:.6g}"), round(a, 1), round(b, 1)]
        for (step, value), (a, b) in zip(points, place, strict=True)
    ]
    described = (
        f"{curve.title}: {number(points[0][1])} at step {points[0][0]}, "
        f"{number(points[-1][1])} at step {points[-1][0]}"
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(described)}" '
        f'data-points="{escape(json.dumps(listed))}">{"".join(parts)}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
    )


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most about `MAX_POINTS` points: of each stretch the lowest and the highest."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / MAX_POINTS)
    kept = {points[0], points[-1]}
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept |= {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
    return sorted(kept)


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean over a twelfth of the values around each, over fewer of them near both ends."""
    reach = max(1, len(values) // 24)
    out = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        window = values[index - near : index + near + 1]
        out.append(sum(window) / len(window))
    return out


def number(value: float) -> str:
    """Three or four digits, as a person would write them."""
    if value == 0:
        return "0"
    if abs(value) >= 1000 and abs(value) < 1e7:
        return f"{value:,.0f}"
    if abs(value) >= 1e-3 and abs(value) < 1000:
        shown = f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))) - 1)}f}"
        return shown.rstrip("0").rstrip(".") if "." in shown else shown
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def _line(place: Sequence[tuple[float, float]], kind: str) -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in place)
    return f'<polyline class="{kind}" points="{points}"/>'


def _axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Bounds around the values, and round numbers between them."""
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-300):
        pad = abs(high) * 0.05 or 1.0
        low, high = low - pad, high + pad
    step = _round_step((high - low) / 5)
    margin = 0.04 * (high - low)
    low, high = low - margin, high + margin
    ticks = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return low, high, ticks


def _steps(first: int, last: int) -> list[int]:
    size = max(1, int(_round_step(max(1, last - first) / 4)))
    inner = [i * size for i in range(first // size + 1, last // size + 1)]
    # The first label stands alone only if the next one leaves room for it.
    crowded = inner and inner[0] - first < size / 2
    return inner if crowded else [first, *inner]


def _round_step(rough: float) -> float:
    power = 10 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
