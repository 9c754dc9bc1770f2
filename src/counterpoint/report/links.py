"""Bytes per directed link as a picture: a matrix with the senders as rows. Needs the extra `report`."""

from __future__ import annotations

from pathlib import Path

from counterpoint.report.figure import FAINT, INK, MUTED, check_path, new_figure, save, text_on, tint
from counterpoint.report.lanes import PALETTE
from counterpoint.report.numbers import all_ranks
from counterpoint.report.units import format_bytes
from counterpoint.schedule.timeline import Timeline


def draw_links(
    timeline: Timeline, path: str | Path, *, title: str = "Bytes per link", other: Timeline | None = None
) -> Path:
    """Draws the payload bytes of every directed link as a PNG or SVG matrix, and returns the path.

    Row: the sending rank; column: the receiving one. With `other` the two matrices stand side by side and
    share one colour scale. ValueError: a suffix other than .png and .svg. ImportError: matplotlib is missing.
    """
    path = check_path(path)
    timelines = [timeline] if other is None else [timeline, other]
    ranks = all_ranks(timelines)
    count = max(1, len(ranks))
    cell = min(0.78, 6.4 / count)
    side = count * cell
    width = len(timelines) * (side + 0.85) + 0.35
    width, left = max(width, 4.0), max(0.0, (4.0 - width) / 2)
    height = side + 1.32
    figure = new_figure(width, height)
    figure.text(0.2 / width, 1 - 0.27 / height, title, size=13, weight="bold", color=INK, va="center")
    largest = max((n for t in timelines for n in t.bytes_by_link().values()), default=0)
    for index, shown in enumerate(timelines):
        links = shown.bytes_by_link()
        x = left + 0.75 + index * (side + 0.85)
        axes = figure.add_axes((x / width, 0.12 / height, side / width, side / height))
        axes.set_xlim(0, count)
        axes.set_ylim(count, 0)
        axes.set_aspect("equal")
        for row, source in enumerate(ranks):
            for column, destination in enumerate(ranks):
                nbytes = links.get((source, destination), 0)
                strength = 0.12 + 0.88 * nbytes / largest if nbytes else 0.0
                colour = tint(PALETTE[0], strength) if nbytes else "#f5f6f8"
                axes.broken_barh([(column + 0.03, 0.94)], (row + 0.03, 0.94), facecolor=colour, lw=0)
                if nbytes and cell > 0.3:
                    axes.text(
                        column + 0.5,
                        row + 0.5,
                        format_bytes(nbytes).replace(" ", "\n"),
                        size=min(8.5, cell * 13),
                        color=text_on(colour),
                        ha="center",
                        va="center",
                        linespacing=1.15,
                    )
        size = min(8.0, cell * 26)
        names = [str(rank) for rank in ranks]
        at = [i + 0.5 for i in range(len(ranks))]
        axes.set_xticks(at, names, size=size, color=MUTED)
        axes.set_yticks(at, names, size=size, color=MUTED)
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set_xlabel("to rank", size=8, color=MUTED)
        axes.set_ylabel("from rank", size=8, color=MUTED)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        total = f"{shown.source}: {format_bytes(sum(links.values()))} in all"
        figure.text(x / width, 1 - 0.54 / height, total, size=8.5, color=MUTED, va="center")
        axes.hlines([count], 0, count, color=FAINT, lw=0.6)
    return save(figure, path)
