"""Line charts as inline SVG: they need no script, follow the page's light or dark colours, and print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from counterpoint.report.lanes import PALETTE
from counterpoint.report.units import format_bytes, format_seconds

Unit = Literal["", "bytes", "seconds"]

WIDTH, HEIGHT = 900, 270
LEFT, RIGHT, TOP, BOTTOM = 88, 16, 12, 44
MOST_POINTS = 900


@dataclass(frozen=True, slots=True)
class LineChart:
    """Named series of (x, y) points; a point that is not finite is a gap.

    `x_unit` and `y_unit` choose how the scales are written: plain numbers, bytes or seconds. `steps` holds
    each y until the next x; `from_zero` lets the y scale begin at zero.
    """

    series: Mapping[str, Sequence[tuple[float, float]]]
    x_label: str = ""
    y_label: str = ""
    x_unit: Unit = ""
    y_unit: Unit = ""
    steps: bool = False
    from_zero: bool = False


def render_chart(chart: LineChart) -> str:
    """The chart as an HTML figure with its legend; a chart without a finite point says so."""
    points = [p for line in chart.series.values() for p in line if _finite(p)]
    if not points:
        return '<p class="note">No values to draw.</p>'
    x_range = _range([x for x, _ in points])
    y_range = _range([y for _, y in points], from_zero=chart.from_zero)
    y_ticks = ticks(*y_range, 5)
    y_range = (min(y_range[0], y_ticks[0]), max(y_range[1], y_ticks[-1]))

    def place(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (x - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)
        down = TOP + (y_range[1] - y) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM)
        return round(right, 2), round(down, 2)

    parts = []
    for value in y_ticks:
        _, y = place(x_range[0], value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        text = _number(value, y_ticks, chart.y_unit)
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{text}</text>')
    x_ticks = ticks(*x_range, 8)
    for value in x_ticks:
        x, _ = place(value, y_range[0])
        text = _number(value, x_ticks, chart.x_unit)
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{text}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(chart.x_label)}</text>')
    turned = f'transform="translate(13 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"'
    parts.append(f'<text {turned} text-anchor="middle">{escape(chart.y_label)}</text>')

    legend = []
    for index, (name, line) in enumerate(chart.series.items()):
        colour = PALETTE[index % len(PALETTE)]
        dashes = ' stroke-dasharray="5 3"' if index >= len(PALETTE) else ""
        path = _path(thin(line, MOST_POINTS), place, chart.steps)
        parts.append(f'<path class="line" stroke="{colour}"{dashes} d="{path}"/>')
        legend.append(f'<span><i style="background:{colour}"></i>{escape(name)}</span>')
    what = escape(f"Line chart of {chart.y_label or 'values'} over {chart.x_label or 'points'}", quote=True)
    caption = f"<figcaption>{''.join(legend)}</figcaption>" if len(legend) > 1 else ""
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{what}">{"".join(parts)}</svg>'
    return f'<figure class="chart">{svg}{caption}</figure>'


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between `low` and `high`, about `count` of them."""
    rough = (high - low) / count
    ten = 10.0 ** math.floor(math.log10(rough))
    step = next(s * ten for s in (1, 2, 5, 10) if s * ten >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)] or [low, high]


def thin(line: Sequence[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most about `limit` points: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(line) <= limit:
        return list(line)
    stretch = math.ceil(2 * len(line) / limit)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(line), stretch):
        part = [p for p in line[start : start + stretch] if _finite(p)]
        if part:
            ends = {part.index(min(part, key=lambda p: p[1])), part.index(max(part, key=lambda p: p[1]))}
            kept += [part[i] for i in sorted(ends)]
    return kept


def _path(line: Sequence[tuple[float, float]], place, steps: bool) -> str:
    commands: list[str] = []
    pen_down = False
    for point in line:
        if not _finite(point):
            pen_down = False
            continue
        x, y = place(*point)
        commands.append(f"H{x}V{y}" if pen_down and steps else f"{'L' if pen_down else 'M'}{x} {y}")
        pen_down = True
    if len(commands) == 1:
        commands.append("h0.01")
    return "".join(commands)


def _range(values: list[float], from_zero: bool = False) -> tuple[float, float]:
    low, high = min(values), max(values)
    low = min(low, 0.0) if from_zero else low
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return (low if from_zero else low - margin), high + margin
    return low, high


def _number(value: float, among: list[float], unit: Unit) -> str:
    if unit == "bytes":
        return format_bytes(value)
    if unit == "seconds":
        return format_seconds(value)
    step = abs(among[1] - among[0]) if len(among) > 1 else abs(value) or 1.0
    largest = max(abs(v) for v in among)
    if largest >= 1e6 or step < 1e-4:
        return f"{value:.3g}"
    return f"{value:,.{max(0, math.ceil(-math.log10(step) - 1e-9))}f}"


def _finite(point: tuple[float, float]) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])
