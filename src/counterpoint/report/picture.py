"""A timeline as a picture for a README or a paper: lanes per rank, bars, the time that is exposed.

Grey is computing, a colour is a channel, a paler shade is its receiving end, a thin line is a receive that
waits for its sender, red hatching is communication that nothing hides. Needs the extra `report`.
"""

from __future__ import annotations

from pathlib import Path

from counterpoint.report.bars import Frame, Group, draw_arrows, draw_exposed, draw_lane, legend_entries
from counterpoint.report.figure import (
    FAINT,
    INK,
    MUTED,
    STRIPE,
    WIDTH_INCHES,
    check_path,
    new_figure,
    save,
)
from counterpoint.report.lanes import (
    EXPOSED_COLOUR,
    channel_colours,
    clip,
    cut,
    describe,
    lay_out,
    stream_order,
)
from counterpoint.report.units import format_bytes, format_seconds, format_share
from counterpoint.schedule.timeline import Timeline

# Inches around the plot: lane names on the left, shares on the right, title and legend above.
LEFT, RIGHT, TOP, BOTTOM = 1.35, 1.25, 1.02, 0.52
PLOT_WIDTH = WIDTH_INCHES - LEFT - RIGHT
NAMES_END = LEFT / WIDTH_INCHES - 0.006
SHARES_START, SHARES_END = 1 - RIGHT / WIDTH_INCHES + 0.01, 0.984
TITLE_START = 0.018


def draw_timeline(
    timeline: Timeline,
    path: str | Path,
    *,
    title: str = "Timeline",
    other: Timeline | None = None,
    memory: bool = False,
    window: tuple[float, float] | None = None,
    max_ranks: int = 8,
) -> Path:
    """Draws a timeline as a 1600 pixel wide PNG or an SVG, and returns the path.

    With `other` (a prediction beside a measurement) the two stand one above the other for each rank, both
    with their first span at time zero. `window` is (start, stop) in seconds after the first span. `memory`
    adds the live bytes of each rank. Of more than `max_ranks` ranks the first are drawn, and a note says so.
    ValueError: a suffix other than .png and .svg, an empty window, or max_ranks < 1. ImportError: matplotlib
    is missing.
    """
    path = check_path(path)
    if max_ranks < 1:
        raise ValueError(f"max_ranks is {max_ranks}: at least 1 rank must be drawn")
    whole = [timeline] if other is None else [timeline, other]
    drawn = [clip(t, window, max_ranks) for t in whole]
    groups = _groups(drawn, [t.shifted() for t in whole], memory)
    lanes_down = groups[-1].bottom if groups else 1.0
    lane_inches = min(0.215, max(0.1, 11.0 / lanes_down))
    plot_height = max(0.6, lanes_down * lane_inches)
    height = plot_height + TOP + BOTTOM

    figure = new_figure(WIDTH_INCHES, height)
    box = (LEFT / WIDTH_INCHES, BOTTOM / height, PLOT_WIDTH / WIDTH_INCHES, plot_height / height)
    axes = figure.add_axes(box)
    begin, stop = window or (0.0, max((t.stop for t in drawn), default=0.0) or 1e-3)
    axes.set_xlim(begin * 1e3, stop * 1e3)
    axes.set_ylim(lanes_down, 0.0)
    font = min(7.5, lane_inches * 72 * 0.56)
    frame = Frame(axes, channel_colours(drawn), (begin, stop), PLOT_WIDTH / ((stop - begin) * 1e3), font)

    for group in groups:
        _draw_group(frame, group, named=other is not None)
    if other is None:
        draw_arrows(frame, groups)
    _finish_axes(frame)

    about = _about(whole)
    hidden = max(len(t.ranks) for t in whole) - max_ranks
    if hidden > 0:
        about = f"the first {max_ranks} of {max_ranks + hidden} ranks · {about}"
    figure.text(
        TITLE_START,
        1 - 0.27 / height,
        title,
        size=13,
        weight="bold",
        color=INK,
        va="center",
        parse_math=False,
    )
    figure.text(TITLE_START, 1 - 0.51 / height, about, size=8.5, color=MUTED, va="center", parse_math=False)
    entries = legend_entries(frame, groups)
    if entries:
        figure.legend(
            [handle for _, handle in entries],
            [name for name, _ in entries],
            loc="center left",
            bbox_to_anchor=(TITLE_START - 0.005, 1 - (TOP - 0.24) / height),
            ncols=min(9, len(entries)),
            frameon=False,
            fontsize=7.5,
            labelcolor=INK,
            handlelength=1.1,
            handleheight=0.9,
            columnspacing=1.3,
            handletextpad=0.5,
            borderpad=0,
        )
    return save(figure, path)


def _groups(timelines: list[Timeline], whole: list[Timeline], memory: bool) -> list[Group]:
    order = stream_order(timelines)
    lanes = [lay_out(t, order) for t in timelines]
    groups: list[Group] = []
    top = 0.0
    for rank in sorted({rank for t in timelines for rank in t.ranks}):
        for timeline, all_of_it, laid in zip(timelines, whole, lanes):
            mine = tuple(lane for lane in laid if lane.rank == rank)
            has_memory = memory and any(m.rank == rank for m in timeline.memory)
            if mine or has_memory:
                groups.append(Group(timeline, all_of_it, rank, mine, top, has_memory))
                top = groups[-1].bottom + 0.25
        top += 0.4
    return groups


def _about(timelines: list[Timeline]) -> str:
    if len(timelines) == 1:
        return f"{describe(timelines[0], 105)} · {format_seconds(timelines[0].seconds)}"
    each = ", ".join(f"{t.source} {format_seconds(t.seconds)}" for t in timelines)
    return f"{each} · {describe(timelines[0], 90).partition(' · ')[2]}"


def _draw_group(frame: Frame, group: Group, named: bool) -> None:
    draw_exposed(frame, group)
    for index, lane in enumerate(group.lanes):
        y = group.top + index
        frame.axes.axhspan(y + 0.06, y + 0.94, color=STRIPE, lw=0, zorder=0)
        draw_lane(frame, lane, y)
        frame.write(NAMES_END, y + 0.5, lane.label, size=frame.font, color=MUTED, ha="right")
    middle = group.top + len(group.lanes) / 2
    name_at = middle - 0.45 if named else middle
    frame.write(TITLE_START, name_at, f"rank {group.rank}", size=9, weight="bold", color=INK)
    if named:
        frame.write(TITLE_START, middle + 0.55, group.timeline.source, size=7.5, color=MUTED)
    if len(group.lanes) >= 3:
        _write_shares(frame, group)
    if group.has_memory:
        _draw_memory(frame, group)


def _write_shares(frame: Frame, group: Group) -> None:
    """Percent per category: unlike bars, which stay whole, shares end at the edge of the window."""
    whole = group.whole
    seconds = max(0.0, min(frame.window[1], whole.stop) - max(frame.window[0], whole.start))
    values = cut(whole, frame.window, group.rank).categories(group.rank)
    # The cut holds this rank only, but it is idle as long as another one still works.
    values["idle"] = max(0.0, seconds - values["compute"] - values["exposed"])
    step = min(1.0, len(group.lanes) / 4)
    for i, (name, value) in enumerate(values.items()):
        y = group.top + len(group.lanes) / 2 + (i - 1.5) * step
        colour = {"exposed": EXPOSED_COLOUR, "compute": INK}.get(name, MUTED)
        size = min(7.5, frame.font * 1.1 * step)
        frame.write(SHARES_START, y, name, size=size, color=colour)
        frame.write(SHARES_END, y, format_share(value, seconds), size=size, color=colour, ha="right")


def _draw_memory(frame: Frame, group: Group) -> None:
    events = sorted((m.time, m.live_bytes) for m in group.timeline.memory if m.rank == group.rank)
    peak = max(n for _, n in events) or 1
    base, height = group.bottom - 0.1, group.bottom - group.top - len(group.lanes) - 0.25
    times = [t * 1e3 for t, _ in events] + [max(group.timeline.stop, events[-1][0]) * 1e3]
    levels = [base - height * n / peak for _, n in events]
    levels.append(levels[-1])
    frame.axes.fill_between(times, levels, base, step="post", color=FAINT, lw=0, zorder=1)
    frame.axes.step(times, levels, where="post", color=MUTED, lw=0.8, zorder=2)
    y = base - height / 2
    frame.write(NAMES_END, y, "live bytes", size=frame.font, color=MUTED, ha="right")
    note = f"peak {format_bytes(group.timeline.peak_bytes(group.rank))}"
    frame.write(SHARES_START, y, note, size=min(7.5, frame.font * 1.1), color=MUTED)


def _finish_axes(frame: Frame) -> None:
    axes = frame.axes
    axes.set_yticks([])
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(axis="x", labelsize=8, colors=MUTED, length=3, color=FAINT)
    axes.grid(axis="x", color=FAINT, lw=0.6, zorder=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel("milliseconds", size=8, color=MUTED)
