"""What a timeline looks like before anyone draws it: lanes, colours, matched sends and receives.

The PNG, the HTML page and the text Gantt all draw from here, so that they agree with one another.
A lane is one stream of one rank. The stream "q.send" is the channel "q" in the direction "send"; a
channel has one colour, and a receive is a paler one.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from counterpoint.schedule.timeline import Span, Timeline

COMPUTE_COLOUR = "#56606f"
EXPOSED_COLOUR = "#c2183c"

# Neighbours differ in lightness as well as in hue, so that they stay apart for colour-blind readers and
# in grey print.
PALETTE = ("#1f78c8", "#d9540b", "#0b9a74", "#c85a9e", "#55b4e6", "#7c5cc4", "#e3a008", "#8a8a2a")
# A plain hash lets common names share a colour; this salt is one that keeps the shipped channels apart.
_SALT = 38426

MAX_ROWS = 4


@dataclass(frozen=True, slots=True)
class Bar:
    """A span as it is drawn: `begin` (seconds) is when something moved, `row` its place in the lane.

    A receive is posted at `span.start` and waits for its sender until `begin`.
    """

    span: Span
    begin: float
    row: int
    partner: int | None


@dataclass(frozen=True, slots=True)
class Lane:
    """All bars of one stream of one rank, in order of time, on `rows` rows."""

    rank: int
    stream: str
    rows: int
    bars: tuple[Bar, ...]

    @property
    def channel(self) -> str:
        return channel_of(self.stream)[0]

    @property
    def direction(self) -> str:
        return channel_of(self.stream)[1]

    @property
    def label(self) -> str:
        return " ".join(part for part in channel_of(self.stream) if part)

    @property
    def is_compute(self) -> bool:
        return bool(self.bars) and all(bar.span.kind in ("compute", "copy") for bar in self.bars)


def channel_of(stream: str) -> tuple[str, str]:
    """Channel and direction of a stream: `("q", "send")` for "q.send", `("gather", "")` for "gather"."""
    channel, _, direction = stream.rpartition(".")
    return (channel, direction) if channel else (direction, "")


def is_pale(lane: Lane) -> bool:
    """Whether a lane is drawn in the paler shade of its channel: it only receives."""
    return bool(lane.bars) and all(bar.span.kind == "recv" for bar in lane.bars)


def channel_colours(timelines: Iterable[Timeline]) -> dict[str, str]:
    """A colour per channel (hex), the same in every picture unless more channels meet than there are colours.

    Streams that only compute or copy are left out: they are drawn in `COMPUTE_COLOUR`.
    """
    moving = (s for t in timelines for s in t.spans if s.kind not in ("compute", "copy"))
    channels = {channel_of(s.stream)[0] for s in moving}
    colours: dict[str, str] = {}
    for channel in sorted(channels):
        wanted = zlib.crc32(f"{_SALT}{channel}".encode()) % len(PALETTE)
        free = [PALETTE[(wanted + i) % len(PALETTE)] for i in range(len(PALETTE))]
        taken = set(colours.values())
        colours[channel] = next((c for c in free if c not in taken), free[0])
    return colours


def stream_order(timelines: Iterable[Timeline]) -> list[str]:
    """One order of streams for all ranks: computing ones first, then by channel, sends before receives."""
    first: dict[str, float] = {}
    computes: dict[str, bool] = {}
    for timeline in timelines:
        zero = timeline.start
        for s in timeline.spans:
            first[s.stream] = min(first.get(s.stream, float("inf")), s.start - zero)
            computes[s.stream] = computes.get(s.stream, True) and s.kind in ("compute", "copy")
    channel_first: dict[str, float] = {}
    for stream, time in first.items():
        channel = channel_of(stream)[0]
        channel_first[channel] = min(channel_first.get(channel, float("inf")), time)

    def key(stream: str) -> tuple[bool, float, str, bool, str]:
        channel, direction = channel_of(stream)
        return not computes[stream], channel_first[channel], channel, direction != "send", direction

    return sorted(first, key=key)


def match_transfers(spans: list[Span]) -> list[tuple[int, int]]:
    """Pairs (index of a send, index of its receive): first sent, first received, per channel and direction.

    A send without a receive in the list, or the reverse, stays unpaired (a clipped or one-sided recording).
    """
    queues: dict[tuple[int, int, str], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for index in sorted(range(len(spans)), key=lambda i: spans[i].start):
        s = spans[index]
        if s.peer is None:
            continue
        channel = channel_of(s.stream)[0]
        if s.kind == "send":
            queues[s.rank, s.peer, channel][0].append(index)
        elif s.kind == "recv":
            queues[s.peer, s.rank, channel][1].append(index)
    return [pair for sends, receives in queues.values() for pair in zip(sends, receives)]


def transfer_begins(spans: list[Span], pairs: list[tuple[int, int]] | None = None) -> list[float]:
    """When something began to move in each span: a posted receive waits for the send it is paired with."""
    begins = [s.start for s in spans]
    for send, receive in match_transfers(spans) if pairs is None else pairs:
        begins[receive] = min(max(spans[receive].start, spans[send].start), spans[receive].stop)
    return begins


def lay_out(timeline: Timeline, order: list[str] | None = None) -> list[Lane]:
    """Lanes of every rank in order, with their bars; `Bar.partner` is an index into `timeline.spans`."""
    spans = timeline.spans
    pairs = match_transfers(spans)
    partner = dict(pairs) | {receive: send for send, receive in pairs}
    lanes: dict[tuple[int, str], list[tuple[float, int]]] = defaultdict(list)
    for index, begin in enumerate(transfer_begins(spans, pairs)):
        lanes[spans[index].rank, spans[index].stream].append((begin, index))
    order = order or stream_order([timeline])
    drawn = []
    for rank, stream in sorted(lanes, key=lambda key: (key[0], order.index(key[1]))):
        entries = sorted(lanes[rank, stream])
        rows = _rows([(begin, spans[index].stop) for begin, index in entries])
        bars = tuple(Bar(spans[i], begin, row, partner.get(i)) for (begin, i), row in zip(entries, rows))
        drawn.append(Lane(rank, stream, max(rows, default=0) + 1, bars))
    return drawn


def exposed(timeline: Timeline, rank: int) -> list[tuple[float, float]]:
    """Intervals (seconds) in which communication of a rank is under way and nothing runs on it."""
    compute = timeline.busy(rank, ("compute", "copy"))
    left: list[tuple[float, float]] = []
    j = 0
    for a, b in timeline.busy(rank, ("send", "recv", "collective")):
        while j < len(compute) and compute[j][1] <= a:
            j += 1
        k, at = j, a
        while k < len(compute) and compute[k][0] < b:
            if compute[k][0] > at:
                left.append((at, compute[k][0]))
            at = max(at, compute[k][1])
            k += 1
        if at < b:
            left.append((at, b))
    return left


def clip(timeline: Timeline, window: tuple[float, float] | None = None, ranks: int | None = None) -> Timeline:
    """The part of a timeline to draw, with time zero at its first span.

    `window` is (start, stop) in seconds after the first span; a span that reaches into it is kept whole. A receive
    whose message sets out later is left out, and one whose sender is not kept begins when its message sets out.
    `ranks` keeps that many of the lowest ranks. ValueError: an empty or reversed window.
    """
    whole = timeline.shifted()
    keep = set(whole.ranks if ranks is None else whole.ranks[:ranks])
    if window is not None and not window[0] < window[1]:
        raise ValueError(f"window {window} is empty: give (start, stop) in seconds with start < stop")
    a, b = window or (float("-inf"), float("inf"))
    begins = transfer_begins(whole.spans)
    spans = []
    for s, begin in zip(whole.spans, begins, strict=True):
        if s.rank in keep and s.stop >= a and begin <= b:
            spans.append(replace(s, start=begin) if s.kind == "recv" and s.peer not in keep else s)
    memory = [m for m in whole.memory if m.rank in keep]
    return Timeline(whole.source, spans, memory, whole.meta)


def cut(timeline: Timeline, window: tuple[float, float], rank: int) -> Timeline:
    """A rank's spans cut to the window (seconds on the timeline's own clock), to take shares of."""
    a, b = window
    spans = []
    for s in timeline.spans:
        if s.rank == rank and s.stop >= a and s.start <= b:
            whole = a <= s.start and s.stop <= b
            spans.append(s if whole else replace(s, start=max(s.start, a), stop=min(s.stop, b)))
    return Timeline(timeline.source, spans, [], timeline.meta)


def describe(timeline: Timeline, limit: int = 120) -> str:
    """One line on where a timeline comes from: its source, ranks and the plain values of its `meta`."""
    count = len(timeline.ranks)
    parts = [timeline.source, f"{count} rank{'' if count == 1 else 's'}"]
    parts += [f"{key.replace('_', ' ')} {plain(value)}" for key, value in timeline.meta.items()]
    parts = [" ".join(part.split()) for part in parts]
    text = ""
    for part in parts:
        longer = f"{text} · {part}" if text else part
        if len(longer) > limit:
            break
        text = longer
    return text


def plain(value: object) -> str:
    """A JSON value in words: lists with commas, whole numbers from 10,000 on with thousands set off."""
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(one) for one in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def _rows(intervals: list[tuple[float, float]]) -> list[int]:
    """The first free row for each interval (sorted by start); what does not fit shares the last row."""
    free_at: list[float] = []
    rows = []
    for begin, stop in intervals:
        row = next((i for i, time in enumerate(free_at) if time <= begin), len(free_at))
        row = min(row, MAX_ROWS - 1)
        if row == len(free_at):
            free_at.append(stop)
        else:
            free_at[row] = max(free_at[row], stop)
        rows.append(row)
    return rows
