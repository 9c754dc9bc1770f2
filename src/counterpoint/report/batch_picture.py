"""Plans of one batch as a picture: ranks down, time across, a box for every group. Needs the extra `report`.

A box is as high as the group has ranks; its blue is the darker the more ranks share a sequence. Red is communication
that nothing hides, grey nothing to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from counterpoint.report.figure import (
    FAINT,
    INK,
    MUTED,
    WIDTH_INCHES,
    check_path,
    new_figure,
    save,
    text_on,
    tint,
)

if TYPE_CHECKING:
    from counterpoint.planner.batch import BatchPlan
    from counterpoint.planner.batch_predict import Prediction

COMPUTE, EXPOSED, IDLE = "#1d4ed8", "#dc2626", "#eef0f3"
LEFT, RIGHT, TOP, BOTTOM = 0.62, 0.2, 0.62, 0.5  # inches around a panel


def draw_plans(plans: Sequence[tuple[BatchPlan, Prediction]], path: str | Path) -> Path:
    """Draws plans one above the other on one scale of time as .png or .svg, and returns the path.

    ValueError: another suffix, or no plans. ImportError: matplotlib is missing.
    """
    path = check_path(path)
    if not plans:
        raise ValueError("there is no plan to draw")
    longest = max(found.seconds for _, found in plans)
    inches = 2.1
    height = len(plans) * (inches + TOP) + BOTTOM
    figure = new_figure(WIDTH_INCHES, height)
    for number, (plan, found) in enumerate(plans):
        bottom = BOTTOM + (len(plans) - 1 - number) * (inches + TOP)
        box = (
            LEFT / WIDTH_INCHES,
            bottom / height,
            (WIDTH_INCHES - LEFT - RIGHT) / WIDTH_INCHES,
            inches / height,
        )
        axes = figure.add_axes(box)
        _draw(axes, plan, found, longest)
        axes.tick_params(labelbottom=number == len(plans) - 1)
        if number == len(plans) - 1:
            axes.set_xlabel(
                "seconds (predicted).  Blue: computing, darker where more ranks share a sequence; "
                "red: communication that nothing hides; grey: idle",
                fontsize=7.5,
                color=MUTED,
            )
    return save(figure, path)


def _draw(axes: Any, plan: BatchPlan, found: Prediction, longest: float) -> None:
    from matplotlib.patches import Rectangle

    n = plan.world_size
    axes.set_xlim(0, longest * 1.001)
    axes.set_ylim(n, 0)
    axes.add_patch(Rectangle((0, 0), found.seconds, n, facecolor=IDLE, edgecolor="none"))
    for bar in found.bars:
        size = len(bar.group.ranks)
        colour = tint(COMPUTE, 0.25 + 0.75 * math.log2(size + 1) / math.log2(n + 1))
        for first, count in _runs(bar.group.ranks):
            for start, seconds, fill in (
                (bar.start, bar.compute, colour),
                (bar.start + bar.compute, bar.communication, EXPOSED),
            ):
                axes.add_patch(Rectangle((start, first), seconds, count, facecolor=fill, edgecolor="none"))
            outline = Rectangle(
                (bar.start, first), bar.stop - bar.start, count, fill=False, edgecolor="white", linewidth=0.4
            )
            axes.add_patch(outline)
            if bar.compute > 0.05 * longest and count >= 0.09 * n:
                label = f"{len(bar.group.sequences)} on {size}"
                axes.text(
                    bar.start + bar.compute / 2,
                    first + count / 2,
                    label,
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color=text_on(colour),
                )
    title = (
        f"{plan.solver}: {found.seconds:.3g} s; computing {found.compute / found.seconds:.0%}, "
        f"communication {found.communication / found.seconds:.0%}, idle {found.idle / found.seconds:.0%}"
    )
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.set_ylabel("rank", fontsize=7.5, color=MUTED)
    axes.tick_params(labelsize=7, colors=MUTED, length=2)
    for side in axes.spines.values():
        side.set_color(FAINT)


def _runs(ranks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of neighbouring ranks."""
    first = count = 0
    for rank in ranks:
        if count and rank == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = rank, 1
    yield first, count
