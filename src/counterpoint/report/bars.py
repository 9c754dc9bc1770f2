"""The marks of a timeline picture: bars with their names, waits, exposed time, arrows, and their legend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from counterpoint.report.figure import DPI, MUTED, text_on, tint
from counterpoint.report.lanes import COMPUTE_COLOUR, EXPOSED_COLOUR, Bar, Lane, exposed, is_pale
from counterpoint.report.units import format_bytes
from counterpoint.schedule.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

PALE = 0.45
MOST_ARROWS = 40
MEMORY_LANES = 1.6  # height of a memory strip, in lanes
EXPOSED_STYLE: dict[str, Any] = {
    "facecolor": tint(EXPOSED_COLOUR, 0.12),
    "edgecolor": EXPOSED_COLOUR,
    "hatch": "/////",
    "lw": 0,
}


@dataclass(frozen=True, slots=True)
class Frame:
    """What every mark is drawn with: x in milliseconds, y in lanes downwards, `window` in seconds."""

    axes: Axes
    colours: dict[str, str]
    window: tuple[float, float]
    inches_per_ms: float
    font: float

    def write(self, x: float, y: float, text: str, **style: Any) -> None:
        """Text beside the plot: x in fractions of the figure's width, y in lanes."""
        from matplotlib.transforms import blended_transform_factory

        margin = blended_transform_factory(self.axes.figure.transFigure, self.axes.transData)
        self.axes.text(x, y, text, transform=margin, va="center", parse_math=False, **style)

    def colour(self, lane: Lane) -> str:
        """The colour of a lane's bars: its channel's, paler when the lane only receives."""
        if lane.is_compute:
            return COMPUTE_COLOUR
        return tint(self.colours[lane.channel], PALE) if is_pale(lane) else self.colours[lane.channel]


@dataclass(frozen=True, slots=True)
class Group:
    """The lanes of one rank of one timeline, and the height at which they start (in lanes, downwards).

    timeline: what is drawn; whole: what shares and exposed time are taken from.
    """

    timeline: Timeline
    whole: Timeline
    rank: int
    lanes: tuple[Lane, ...]
    top: float
    has_memory: bool

    @property
    def bottom(self) -> float:
        return self.top + len(self.lanes) + (MEMORY_LANES if self.has_memory else 0.0)


def draw_exposed(frame: Frame, group: Group) -> None:
    """Hatches the time in which a rank communicates and nothing runs, on its computing lanes."""
    lost = [(a * 1e3, b * 1e3) for a, b in exposed(group.whole, group.rank)]
    spots = coalesce(lost, 0.5 / DPI / frame.inches_per_ms)
    for index, lane in enumerate(group.lanes):
        if lane.is_compute:
            frame.axes.broken_barh(spots, (group.top + index + 0.1, 0.8), zorder=1, **EXPOSED_STYLE)


def draw_lane(frame: Frame, lane: Lane, y: float) -> None:
    """Draws bars and waits of a lane whose upper edge is at height y, and names the bars that have room."""
    colour = frame.colour(lane)
    height = 0.8 / lane.rows
    edge = "white" if len(lane.bars) < 200 else "none"
    for row in range(lane.rows):
        at = y + 0.1 + row * height
        bars = [bar for bar in lane.bars if bar.row == row]
        extents = [(bar.begin * 1e3, bar.span.stop * 1e3) for bar in bars]
        spots = coalesce(extents, 0.4 / DPI / frame.inches_per_ms)
        frame.axes.broken_barh(spots, (at, height), facecolor=colour, edgecolor=edge, lw=0.4, zorder=2)
        waits = [(bar.span.start * 1e3, bar.begin * 1e3) for bar in bars if bar.begin > bar.span.start]
        if waits:
            starts, stops = zip(*waits)
            frame.axes.hlines([at + height / 2] * len(waits), starts, stops, color=colour, lw=0.9, zorder=1.5)
    if lane.rows == 1:
        _name_bars(frame, lane, y + 0.52, text_on(colour))


def _name_bars(frame: Frame, lane: Lane, y: float, colour: str) -> None:
    left, right = (edge * 1e3 for edge in frame.window)
    for bar in lane.bars:
        a, b = max(bar.begin * 1e3, left), min(bar.span.stop * 1e3, right)
        room = (b - a) * frame.inches_per_ms * 72 - 3
        text = next((t for t in _labels(bar) if len(t) * frame.font * 0.58 < room), "")
        if text:
            frame.axes.text(
                (a + b) / 2,
                y,
                text,
                size=frame.font,
                color=colour,
                ha="center",
                va="center",
                zorder=3,
                clip_on=True,
                parse_math=False,
            )


def _labels(bar: Bar) -> list[str]:
    """Longest first: name and size, the name, its last word (the value that a step works on)."""
    name = bar.span.name
    sized = [f"{name}  {format_bytes(bar.span.nbytes)}"] if bar.span.nbytes else []
    return [*sized, name, name.rpartition(" ")[2]]


def coalesce(intervals: list[tuple[float, float]], resolution: float) -> list[tuple[float, float]]:
    """(left, width) of sorted intervals, small ones closer than `resolution` joined, none narrower than it.

    Twenty thousand spans on sixteen hundred pixels would otherwise be drawn as twenty thousand shapes.
    """
    joined: list[list[float]] = []
    for a, b in intervals:
        if joined and b - a < 4 * resolution and a - joined[-1][1] < resolution:
            joined[-1][1] = max(joined[-1][1], b)
        else:
            joined.append([a, max(b, a + resolution)])
    return [(a, b - a) for a, b in joined]


def draw_arrows(frame: Frame, groups: list[Group]) -> None:
    """Joins sends to their receives, behind the bars, while there are few enough of them to tell apart."""
    places: dict[int, tuple[float, float]] = {}
    for group in groups:
        for index, lane in enumerate(group.lanes):
            for bar in lane.bars:
                middle = group.top + index + 0.1 + (bar.row + 0.5) * 0.8 / lane.rows
                places[id(bar.span)] = (bar.begin + bar.span.stop) * 500, middle
    arrows = []
    for group in groups:
        for lane in group.lanes:
            for bar in lane.bars:
                if bar.span.kind != "send" or bar.partner is None:
                    continue
                received = group.timeline.spans[bar.partner]
                if frame.window[0] <= bar.span.start and received.stop <= frame.window[1]:
                    arrows.append((bar.span, received, frame.colours[lane.channel]))
    if len(arrows) > MOST_ARROWS:
        return
    for sent, received, colour in arrows:
        style = {"color": colour, "alpha": 0.6, "lw": 0.8, "shrinkB": 6, "zorder": 1.2}
        style |= {"arrowstyle": "-|>,head_width=0.13,head_length=0.3", "connectionstyle": "arc3,rad=0.06"}
        frame.axes.annotate(
            "", xy=places[id(received)], xytext=places[id(sent)], zorder=1.2, arrowprops=style
        )


def legend_entries(frame: Frame, groups: list[Group]) -> list[tuple[str, Artist]]:
    """Names and handles of everything that occurs in these groups."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lanes = [lane for group in groups for lane in group.lanes]
    moving = [lane for lane in lanes if not lane.is_compute]
    entries: list[tuple[str, Artist]] = []
    if len(moving) < len(lanes):
        entries.append(("compute", Patch(facecolor=COMPUTE_COLOUR)))
    for channel in dict.fromkeys(lane.channel for lane in moving):
        mine = [lane for lane in moving if lane.channel == channel]
        for pale, word in ((False, "sent"), (True, "received")):
            example = next((lane for lane in mine if is_pale(lane) == pale), None)
            if example is not None:
                name = f"{channel} {word}" if example.direction else channel
                entries.append((name, Patch(facecolor=frame.colour(example))))
    if any(bar.begin > bar.span.start for lane in lanes for bar in lane.bars):
        entries.append(("posted, waiting", Line2D([], [], color=MUTED, lw=1)))
    if any(exposed(group.timeline, group.rank) for group in groups):
        entries.append(("exposed", Patch(**EXPOSED_STYLE)))
    return entries
