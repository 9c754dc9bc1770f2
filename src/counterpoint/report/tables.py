"""A timeline's numbers for people in a terminal: rich tables and a Gantt chart in plain text."""

from __future__ import annotations

from rich.table import Table

from counterpoint.report.lanes import Lane, clip, exposed, lay_out, stream_order
from counterpoint.report.numbers import CATEGORIES, all_ranks, category_lines
from counterpoint.report.units import (
    NOTHING,
    format_bytes,
    format_change,
    format_seconds,
    format_share,
    signed,
)
from counterpoint.schedule.timeline import Timeline

KINDS = ("compute", "copy", "send", "recv", "collective", "wait", "exposed")
BLOCKS: dict[str, str] = dict(zip(KINDS, "█▆▓▒▓·!"))
ASCII: dict[str, str] = dict(zip(KINDS, "#%><=.!"))


def category_table(timeline: Timeline, other: Timeline | None = None) -> Table:
    """Seconds and share of compute, hidden, exposed and idle per rank, with peak live bytes and bytes sent.

    With `other`: a line per rank and category, with the difference of `other` from `timeline`.
    """
    if other is not None:
        return _category_differences(timeline, other)
    table = Table(title=f"{timeline.source}, {format_seconds(timeline.seconds)}", title_justify="left")
    table.add_column("rank", justify="right")
    for category in CATEGORIES:
        table.add_column(category, justify="right", style="red" if category == "exposed" else None)
    for column in ("peak", "sent", "received"):
        table.add_column(column, justify="right")
    for rank in timeline.ranks:
        values = timeline.categories(rank)
        shares = [f"{format_seconds(v)} {format_share(v, timeline.seconds):>7}" for v in values.values()]
        sizes = timeline.peak_bytes(rank), timeline.bytes_sent(rank), timeline.bytes_received(rank)
        table.add_row(str(rank), *shares, *(format_bytes(n) for n in sizes))
    return table


def _category_differences(timeline: Timeline, other: Timeline) -> Table:
    table = Table(title=f"{timeline.source} and {other.source}", title_justify="left")
    for column in ("rank", "category", timeline.source, other.source, "difference", "change"):
        table.add_column(column, justify="left" if column == "category" else "right")
    for line in category_lines([timeline, other]):
        a, b = line.seconds
        texts = [NOTHING if v is None else format_seconds(v) for v in (a, b)]
        if a is None or b is None:
            texts += [NOTHING, NOTHING]
        else:
            texts += [signed(format_seconds(b - a), b - a), format_change(a, b)]
        rank = str(line.rank) if line.category == CATEGORIES[0] else ""
        table.add_row(rank, line.category, *texts, end_section=line.category == CATEGORIES[-1])
    return table


def link_table(timeline: Timeline) -> Table:
    """Payload bytes per directed link: a row per sending rank, a column per receiving one, and the sums."""
    links = timeline.bytes_by_link()
    ranks = all_ranks([timeline])
    table = Table(title="bytes from (row) to (column)", title_justify="left", show_footer=True)
    table.add_column("rank", justify="right", footer="sum")
    for rank in ranks:
        received = format_bytes(timeline.bytes_received(rank))
        table.add_column(str(rank), justify="right", footer=received)
    table.add_column("sum", justify="right", footer=format_bytes(sum(links.values())))
    for source in ranks:
        cells = [links.get((source, destination), 0) for destination in ranks]
        texts = [format_bytes(n) if n else NOTHING for n in cells]
        table.add_row(str(source), *texts, format_bytes(sum(cells)))
    return table


def text_timeline(
    timeline: Timeline,
    width: int = 100,
    *,
    window: tuple[float, float] | None = None,
    ascii: bool = False,
) -> str:
    """A Gantt chart in plain text, each line `width` characters: one per rank and stream, a scale, a key.

    A cell shows what holds most of its time; on compute lines `!` marks communication that nothing hides.
    `window` is (start, stop) in seconds after the first span. `ascii` keeps to seven-bit characters.
    ValueError: a width below 40, an empty window.
    """
    if width < 40:
        raise ValueError(f"width {width} is too narrow for a timeline: give at least 40 characters")
    drawn = clip(timeline, window)
    marks = ASCII if ascii else BLOCKS
    lanes = lay_out(drawn, stream_order([drawn]))
    names = [_name(lane) for lane in lanes]
    gutter = min(max((len(name) for name in names), default=0) + 1, width // 3)
    columns = width - gutter
    begin, stop = window or (0.0, drawn.stop)
    lines = []
    for lane, name in zip(lanes, names):
        lost = exposed(drawn, lane.rank) if lane.is_compute else []
        cells = _cells(lane, lost, (begin, stop), columns, marks)
        lines.append(name[: gutter - 1].ljust(gutter) + cells)
    left, right = format_seconds(begin), format_seconds(stop)
    scale = left + right.rjust(columns - len(left))
    used: set[str] = {bar.span.kind for lane in lanes for bar in lane.bars}
    used.update(("wait", "exposed"))
    key = "  ".join(f"{mark} {kind}" for kind, mark in marks.items() if kind in used)
    lines.append(" " * gutter + (scale.replace("µ", "u") if ascii else scale))
    lines.append((" " * gutter + key)[:width].ljust(width))
    return "\n".join(lines)


def _name(lane: Lane) -> str:
    return f"{lane.rank:>2} {lane.stream}"


def _cells(
    lane: Lane,
    lost: list[tuple[float, float]],
    window: tuple[float, float],
    columns: int,
    marks: dict[str, str],
) -> str:
    """One line of cells: each shows the kind that covers most of it, if that is more than a quarter."""
    begin, stop = window
    scale = columns / (stop - begin) if stop > begin else 0.0
    cover = [dict.fromkeys(marks, 0.0) for _ in range(columns)]

    def fill(kind: str, a: float, b: float) -> None:
        left, right = max(0.0, (a - begin) * scale), min(float(columns), (b - begin) * scale)
        for cell in range(int(left), min(columns, int(right) + 1)):
            cover[cell][kind] += max(0.0, min(right, cell + 1) - max(left, cell))

    for a, b in lost:
        fill("exposed", a, b)
    for bar in lane.bars:
        fill(bar.span.kind, bar.begin, bar.span.stop)
        fill("wait", bar.span.start, bar.begin)
    line = ""
    for cell in cover:
        # A wait yields to whatever moves in the same cell.
        moving = {kind: part for kind, part in cell.items() if kind != "wait"}
        kind, part = max(moving.items(), key=lambda item: item[1])
        line += marks[kind] if part > 0.25 else marks["wait"] if cell["wait"] > 0.25 else " "
    return line
