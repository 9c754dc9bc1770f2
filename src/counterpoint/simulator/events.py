"""What is to happen, by time: a binary heap in arrays, which compiled code can use without managing memory."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from counterpoint.simulator.program import Array

STEP_ENDS, FLOW_STARTS, FLOW_ENDS, MEETING_ENDS = range(4)
INDICES = 1 << 40


class Events(NamedTuple):
    """The heap: of two events at one moment the kind of lower number comes first, then the lower index."""

    time: Array
    what: Array  # kind x INDICES + index
    version: Array  # of a flow's end: that of the prediction, since flows change their rates
    size: Array  # (1,)


def make_events(capacity: int) -> Events:
    whole = np.zeros(capacity, np.int64)
    return Events(np.zeros(capacity), whole, whole.copy(), np.zeros(1, np.int64))


def push(events: Events, time: float, kind: int, index: int, version: int) -> None:
    what, at = kind * INDICES + index, events.size[0]
    events.size[0] += 1
    while at > 0:
        above = (at - 1) // 2
        if time > events.time[above] or (time == events.time[above] and what >= events.what[above]):
            break
        move(events, above, at)
        at = above
    events.time[at], events.what[at], events.version[at] = time, what, version


def drop(events: Events) -> None:
    """Take the first event away: the last one sinks from the top."""
    events.size[0] -= 1
    sink(events, 0, events.size[0])


def sink(events: Events, at: int, last: int) -> None:
    """Let the event at `last` sink from the free place `at` to where it belongs."""
    size, time, what, version = events.size[0], events.time[last], events.what[last], events.version[last]
    while 2 * at + 1 < size:
        below = 2 * at + 1
        if below + 1 < size and (
            events.time[below + 1] < events.time[below]
            or (events.time[below + 1] == events.time[below] and events.what[below + 1] < events.what[below])
        ):
            below += 1
        if time < events.time[below] or (time == events.time[below] and what <= events.what[below]):
            break
        move(events, below, at)
        at = below
    events.time[at], events.what[at], events.version[at] = time, what, version


def move(events: Events, source: int, to: int) -> None:
    events.time[to], events.what[to] = events.time[source], events.what[source]
    events.version[to] = events.version[source]


def forget_outdated(events: Events, versions: Array) -> None:
    """Drop the ends of flows that have been predicted anew since; versions: by flow."""
    kept = 0
    for i in range(events.size[0]):
        kind, index = events.what[i] // INDICES, events.what[i] % INDICES
        if kind != FLOW_ENDS or events.version[i] == versions[index]:
            move(events, i, kept)
            kept += 1
    events.size[0] = kept
    for at in range(kept // 2 - 1, -1, -1):
        sink(events, at, at)
