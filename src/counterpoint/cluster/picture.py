"""A cluster as a drawing (SVG, PNG): one group of every level in full, its neighbours as outlines."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from counterpoint.cluster.cluster import Cluster, Level
from counterpoint.cluster.draw import describe_link
from counterpoint.cluster.units import format_quantity

FILLS = {"package": "#fdf3e1", "node": "#eaf1fb", "island": "#eef7ee", "cluster": "#f6f1fa"}
EDGES = {"package": "#b8842a", "node": "#3b6db3", "island": "#4b8f4b", "cluster": "#7a56a3"}
INK, FAINT = "#1f2933", "#8a97a6"
DRAWN_IN_FULL = 16  # devices; beyond that a level shows one group and outlines of the others
GAP = 0.35


@dataclass(slots=True)
class _Part:
    """A drawn piece: its size, where a cable of the level outside meets it, and its shapes."""

    width: float
    height: float
    shapes: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def add(self, kind: str, *values: Any) -> None:
        self.shapes.append((kind, values))

    def place(self, part: _Part, x: float, y: float) -> None:
        for kind, (x0, y0, *rest) in part.shapes:
            if kind == "line":
                x1, y1, *more = rest
                self.add(kind, x0 + x, y0 + y, x1 + x, y1 + y, *more)
            else:
                self.add(kind, x0 + x, y0 + y, *rest)


def draw(cluster: Cluster, path: str | Path) -> Path:
    """Draw a cluster to a file; the suffix (.svg, .png, .pdf) chooses the format.

    Raises:
        ValueError: matplotlib is not installed (extra `report`), or it does not know the suffix.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install 'counterpoint[report]'") from None
    path = Path(path)
    whole = _group(cluster, len(cluster.levels) - 1, 0) if cluster.levels else _device(0)
    margin, head, foot = 0.3, 0.75, 0.4 * len(cluster.devices) + 0.1
    width, height = max(whole.width, 7.0) + 2 * margin, whole.height + head + foot + margin
    figure = Figure(figsize=(width, height), facecolor="white")
    known = FigureCanvasAgg(figure).get_supported_filetypes()
    if path.suffix.lstrip(".") not in known:
        raise ValueError(f"cannot draw to '{path.name}'; end the name in .svg, .png or .pdf")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    sheet = _Part(width, height)
    sheet.add("text", margin, height - 0.3, cluster.name, 15, INK, "left", "bold")
    sheet.add(
        "text",
        margin,
        height - 0.58,
        cluster.about or f"{cluster.world_size} ranks",
        9.5,
        FAINT,
        "left",
        "normal",
    )
    sheet.place(whole, (width - whole.width) / 2, foot)
    for row, line in enumerate(_legend(cluster)):
        sheet.add("text", margin, foot - 0.25 - 0.4 * row, line, 8.5, INK, "left", "normal")
    _paint(axes, sheet)
    # a drawing kept under version control changes only when the cluster does
    with rc_context({"svg.hashsalt": "counterpoint"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _legend(cluster: Cluster) -> list[str]:
    lines = []
    for name, device in cluster.devices.items():
        memory = ", ".join(
            f"{t.name} {format_quantity(t.size_bytes, 'bytes')} at "
            f"{format_quantity(t.attained.maximum, 'bytes_per_second')}"
            for t in device.memory
        )
        rates = device.rates.get("matmul", {})
        dtype = "bfloat16" if "bfloat16" in rates else next(iter(rates), "")
        matmul = (
            f"; matmul {dtype} {format_quantity(rates[dtype].maximum, 'flops_per_second')}" if dtype else ""
        )
        lines.append(f"{name}: {memory}{matmul}")
    return lines


def _device(rank: int) -> _Part:
    part = _Part(0.72, 0.6)
    part.add("box", 0.0, 0.0, 0.72, 0.6, "#ffffff", INK, 1.0, "-", 0.08)
    part.add("text", 0.36, 0.3, str(rank), 10, INK, "center", "bold")
    return part


def _outline(cluster: Cluster, tier: int, group: int, height: float) -> _Part:
    """A neighbour that is not drawn in full: its level and ranks."""
    level, size = cluster.levels[tier], cluster.sizes[tier]
    part = _Part(1.25, height)
    part.add("box", 0.0, 0.0, 1.25, height, FILLS[level.level], EDGES[level.level], 0.9, "--", 0.1)
    label = f"{level.level} {group}\nranks {group * size:,}\nto {(group + 1) * size - 1:,}"
    part.add("text", 0.625, height / 2, label, 8, EDGES[level.level], "center", "normal")
    return part


def _group(cluster: Cluster, tier: int, group: int) -> _Part:
    level = cluster.levels[tier]
    if level.link == "pairs" or (level.link == "mesh" and tier == 0 and level.count > 2):
        inside = _circle(cluster, tier, group)
    else:
        inside = _row(cluster, tier, group)
    title = f"{level.level}  {level.name}".strip()
    detail = f"{describe_link(level)}, {format_quantity(level.latency_seconds, 'seconds')}"
    if level.attained:
        detail += f"; one flow {format_quantity(level.attained.maximum, 'bytes_per_second')}"
    width = max(inside.width, 0.072 * max(len(detail), 1.15 * len(title))) + 2 * GAP
    part = _Part(width, inside.height + 2 * GAP + 0.4)
    part.add("box", 0.0, 0.0, width, part.height, FILLS[level.level], EDGES[level.level], 1.3, "-", 0.15)
    part.add("text", 0.2, part.height - 0.22, title, 10, EDGES[level.level], "left", "bold")
    part.add("text", 0.2, part.height - 0.44, detail, 8, INK, "left", "normal")
    part.place(inside, (width - inside.width) / 2, GAP * 0.7)
    return part


def _shown(cluster: Cluster, tier: int) -> int:
    """How many children of a group are drawn in full."""
    level = cluster.levels[tier]
    if cluster.sizes[tier] <= DRAWN_IN_FULL:
        return level.count
    return 1 if tier else min(level.count, DRAWN_IN_FULL)


def _row(cluster: Cluster, tier: int, group: int) -> _Part:
    """Children side by side, joined above by a switch or bus bar, or by an arc per pair."""
    level, full = cluster.levels[tier], _shown(cluster, tier)
    first = group * level.count
    parts = [
        _group(cluster, tier - 1, first + i) if tier else _device(first + i)
        for i in range(min(full, level.count))
    ]
    height = max(part.height for part in parts)
    rest = level.count - full
    if tier:
        numbers = [full + i for i in range(min(rest, 2))]
        if rest > 2:
            numbers[-1] = level.count - 1
        parts += [_outline(cluster, tier - 1, first + i, height) for i in numbers]
    elif rest:
        more = _Part(0.72, 0.6)
        more.add("text", 0.36, 0.3, f"+{rest}", 10, FAINT, "center", "normal")
        parts.append(more)
    above = 0.75 if level.link != "mesh" else 0.3 + 0.28 * (len(parts) - 1)
    row = _Part(sum(p.width for p in parts) + GAP * (len(parts) - 1), height + above)
    x, tops = 0.0, []
    for index, part in enumerate(parts):
        if rest > 2 and index == len(parts) - 1:
            row.add("text", x - GAP / 2, height / 2, "···", 11, FAINT, "center", "bold")
        row.place(part, x, height - part.height)
        tops.append(x + part.width / 2)
        x += part.width + GAP
    color = EDGES[level.level]
    if level.link == "mesh":
        for i, a in enumerate(tops):
            for b in tops[i + 1 :]:
                row.add("line", a, height, b, height, color, 1.6, -0.28)
        return row
    bar = height + 0.45
    for top in tops:
        row.add("line", top, height, top, bar, color, 1.6, 0.0)
    row.add(
        "box",
        0.0,
        bar,
        row.width,
        0.26,
        color if level.link == "switch" else "#ffffff",
        color,
        1.3,
        "-",
        0.08,
    )
    row.add("text", row.width / 2, bar + 0.13, level.name or level.link, 8.5, _on(level), "center", "bold")
    return row


def _on(level: Level) -> str:
    return "#ffffff" if level.link == "switch" else EDGES[level.level]


def _circle(cluster: Cluster, tier: int, group: int) -> _Part:
    """Devices on a circle with every cable drawn, thicker and darker for more bandwidth."""
    size, first = cluster.sizes[tier], group * cluster.sizes[tier]
    radius = max(1.2, 0.2 * size)
    part = _Part(2 * radius + 2.6, 2 * radius + 0.7)
    center_x, center_y = radius + 0.4, radius + 0.35
    turn = math.pi / 2 + math.pi / size
    spots = [
        (
            center_x + radius * math.cos(turn - 2 * math.pi * i / size),
            center_y + radius * math.sin(turn - 2 * math.pi * i / size),
        )
        for i in range(size)
    ]
    widths = _cables(cluster, tier)
    classes = sorted(set(widths.values()), reverse=True)
    thick = 4.0 if len(classes) > 1 else 0.9
    colors = ["#12355b", "#3b6db3", "#7fa8d9", "#b9cfe8", "#c9c9c9"]
    for (a, b), rate in sorted(widths.items(), key=lambda item: item[1]):
        color = colors[min(classes.index(rate), len(colors) - 1)]
        part.add("line", *spots[a], *spots[b], color, 0.9 + thick * rate / classes[0], 0.0)
    for index, (x, y) in enumerate(spots):
        part.place(_device(first + index), x - 0.36, y - 0.3)
    for index, rate in enumerate(classes[:5]):
        y = center_y + 0.2 * len(classes) - 0.4 * index
        color = colors[min(index, len(colors) - 1)]
        left = 2 * radius + 1.0
        part.add("line", left, y, left + 0.35, y, color, 0.9 + thick * rate / classes[0], 0.0)
        part.add(
            "text", left + 0.45, y, format_quantity(rate, "bytes_per_second"), 8.5, INK, "left", "normal"
        )
    return part


def _cables(cluster: Cluster, tier: int) -> dict[tuple[int, int], float]:
    """Bytes/s per unordered pair of devices of a group; the larger one where the directions differ."""
    level = cluster.levels[tier]
    if level.link == "mesh":
        pairs = [(a, b) for a in range(level.count) for b in range(a + 1, level.count)]
        return dict.fromkeys(pairs, level.bytes_per_second)
    rates: dict[tuple[int, int], float] = {}
    for link in cluster.graph(tier).links:
        pair = (min(link.source, link.destination), max(link.source, link.destination))
        rates[pair] = max(rates.get(pair, 0.0), link.bytes_per_second)
    return rates


def _paint(axes: Any, sheet: _Part) -> None:
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    for order, (kind, values) in enumerate(sheet.shapes):
        if kind == "box":
            x, y, width, height, fill, edge, line, style, corner = values
            shape = f"round,pad=0,rounding_size={corner}"
            axes.add_patch(
                FancyBboxPatch(
                    (x, y), width, height, boxstyle=shape, facecolor=fill, edgecolor=edge, linewidth=line,
                    linestyle=style, zorder=order,
                )
            )  # fmt: skip
        elif kind == "line":
            x0, y0, x1, y1, color, line, bend = values
            axes.add_patch(
                FancyArrowPatch(
                    (x0, y0), (x1, y1), arrowstyle="-", connectionstyle=f"arc3,rad={bend}", color=color,
                    linewidth=line, shrinkA=0, shrinkB=0, zorder=order,
                )
            )  # fmt: skip
        else:
            x, y, text, size, color, align, weight = values
            axes.text(
                x, y, text, fontsize=size, color=color, ha=align, va="center", fontweight=weight, zorder=order
            )
