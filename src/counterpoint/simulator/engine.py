"""The event loop: executes a program with a virtual clock, in the order in which the runtime's threads would.

A step starts when its stream is free and the values it reads exist. A message moves when both ends have offered it:
a send when its step starts, a receive when it is posted, ahead of its turn, as soon as its channel has a free buffer.
All that happens at one moment is done before rates are computed anew, so equal ranks stay equal to the last bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from counterpoint.simulator.accelerate import accelerated, compiled_before
from counterpoint.simulator.events import (
    FLOW_ENDS,
    FLOW_STARTS,
    INDICES,
    MEETING_ENDS,
    STEP_ENDS,
    Events,
    drop,
    forget_outdated,
    make_events,
    push,
)
from counterpoint.simulator.network import Flows, end_flow, make_flows, rebalance, start_flow
from counterpoint.simulator.program import COPY, EXCHANGE, MEETING, RECV, SEND, TIMED, Array, Program

# Interpreting takes 20 to 100 us a step: as much for so many steps as loading compiled code, and some seconds for so
# many, which come again more often than not, while compiling for twenty seconds is done once and kept on disk.
WORTH_LOADING, WORTH_COMPILING = 10_000, 50_000
TOGETHER = 1e-13  # relative difference below which two events happen at the same moment

# Entries of State.counts.
QUEUED, TAKEN, FINISHED, EVENTS, FULL_RANK, FULL_STEP = range(6)


class State(NamedTuple):
    """What changes while a program runs."""

    start: Array  # (steps,) seconds; of a receive: when it was posted
    stop: Array  # (steps,) seconds, nan for a step that never finished
    waits: Array  # (steps,) values and stream predecessors still missing
    pending: Array  # (steps,) messages of the step still under way
    offers: Array  # (messages,) ends that are ready
    queue: Array  # (steps,) steps that may start now, receives that may finish
    current: Array  # (streams,) the step whose turn it is
    next_post: Array  # (streams,) the next receive to post
    alive_messages: Array  # (streams,) received or posted messages whose buffers are not all free
    held: Array  # (steps,) buffers of a receive that are not free
    readers: Array  # (buffers,) steps still to read it
    alive: Array  # (buffers,) is it allocated
    live: Array  # (ranks,) bytes
    fast: Array  # (ranks,) of them, bytes in the tier that kernels work in
    missing: Array  # (meetings,) members that have not come
    event_rank: Array
    event_time: Array
    event_live: Array
    counts: Array


def run(program: Program) -> State:
    """Execute a program. The caller looks whether all steps finished, and whether memory ran out."""
    p = program
    steps, streams = p.rank.size, p.first.size
    width = int(max(1, np.diff(p.route_at).max(initial=1)))
    flows = make_flows(p.slots, max(1, p.capacity.size), width)
    received = p.kind == RECV
    held = np.where(received, np.diff(p.makes_at), 0)
    records = p.live.size + steps + p.buffer_bytes.size
    # A step of every stream may end, every flow start or end, every meeting end; and as many outdated ends lie about.
    events = make_events(2 * (streams + 2 * p.slots + p.meeting_members.size))
    state = State(
        np.full(steps, np.nan), np.full(steps, np.nan), p.waits.copy(),
        np.diff(p.outgoing_at) + np.diff(p.incoming_at), np.zeros(p.message_bytes.size, np.int8),
        np.zeros(max(1, steps), np.int64), p.first.copy(), np.where(p.depth > 0, p.first, -1),
        np.zeros(streams, np.int64), held,
        p.buffer_readers.copy(), np.zeros(p.buffer_bytes.size, np.bool_), p.live.copy(), p.live.copy(),
        p.meeting_members.copy(), np.zeros(records, np.int64), np.zeros(records), np.zeros(records, np.int64),
        np.array([0, 0, 0, 0, -1, -1]),
    )  # fmt: skip
    worth = steps >= WORTH_LOADING or accelerated.cache_info().currsize  # loaded already
    fast = accelerated() if worth else None
    if fast and (steps >= WORTH_COMPILING or compiled_before(fast)):
        fast(p, state, flows, events, width)
        return state
    # Element by element, lists are several times faster than arrays.
    plain = State(*map(_listed, state))
    loop(Program(*map(_listed, p)), plain, Flows(*map(_listed, flows)), Events(*map(_listed, events)), width)
    return State(*map(np.array, plain))


def _listed(column: Array | int) -> Any:
    return column.tolist() if isinstance(column, np.ndarray) else column


def loop(p: Program, s: State, flows: Flows, events: Events, width: int) -> None:
    for rank in range(len(s.live)):
        _record(s, rank, 0.0)
        if s.fast[rank] > p.limit[rank] and s.counts[FULL_RANK] < 0:
            s.counts[FULL_RANK] = rank
    for stream in range(len(p.first)):
        if p.depth[stream] > 0:
            _post(p, s, stream, 0.0, events)
    for step in range(len(s.waits)):
        if s.waits[step] == 0 and p.kind[step] != RECV:
            _push(s, step)
    _drain(p, s, 0.0, events)
    while events.size[0] > 0 and s.counts[FULL_RANK] < 0:
        time = events.time[0]
        until = time * (1 + TOGETHER)
        while events.size[0] > 0 and events.time[0] <= until and s.counts[FULL_RANK] < 0:
            what, index = events.what[0] // INDICES, events.what[0] % INDICES
            version = events.version[0]
            drop(events)
            if what == STEP_ENDS:
                _finish(p, s, index, time, events)
            elif what == FLOW_STARTS:
                if p.message_bytes[index] > 0:
                    start_flow(p, flows, width, index, time)
                else:
                    _message_ends(p, s, index)
            elif what == FLOW_ENDS:
                if flows.version[index] == version:
                    _message_ends(p, s, end_flow(p, flows, width, index))
            else:
                for i in range(p.meeting_at[index], p.meeting_at[index + 1]):
                    _finish(p, s, p.meeting_steps[i], time, events)
            _drain(p, s, time, events)
        if 2 * events.size[0] > len(events.time):
            forget_outdated(events, flows.version)
        rebalance(p, flows, width, time, events)


def _push(s: State, step: int) -> None:
    s.queue[s.counts[QUEUED] % len(s.queue)] = step
    s.counts[QUEUED] += 1


def _drain(p: Program, s: State, time: float, events: Events) -> None:
    while s.counts[TAKEN] < s.counts[QUEUED] and s.counts[FULL_RANK] < 0:
        step = s.queue[s.counts[TAKEN] % len(s.queue)]
        s.counts[TAKEN] += 1
        kind = p.kind[step]
        if kind == RECV or s.start[step] == s.start[step]:  # it had started; its messages have come
            _finish(p, s, step, time, events)
            continue
        s.start[step] = time
        if kind == TIMED:
            if p.seconds[step] > 0:
                push(events, time + p.seconds[step], STEP_ENDS, step, 0)
            else:
                _finish(p, s, step, time, events)
        elif kind == COPY:
            message = p.outgoing[p.outgoing_at[step]]
            push(events, time + p.message_latency[message], FLOW_STARTS, message, 0)
        elif kind == MEETING:
            meeting = p.outgoing[p.outgoing_at[step]]
            s.missing[meeting] -= 1
            if s.missing[meeting] == 0:
                push(events, time + p.meeting_seconds[meeting], MEETING_ENDS, meeting, 0)
        else:
            assert kind in (SEND, EXCHANGE)
            if s.pending[step] == 0:
                _finish(p, s, step, time, events)
            for i in range(p.incoming_at[step], p.incoming_at[step + 1]):
                _offer(p, s, p.incoming[i], time, events)
            for i in range(p.outgoing_at[step], p.outgoing_at[step + 1]):
                _offer(p, s, p.outgoing[i], time, events)


def _offer(p: Program, s: State, message: int, time: float, events: Events) -> None:
    s.offers[message] += 1
    if s.offers[message] == 2:
        push(events, time + p.message_latency[message], FLOW_STARTS, message, 0)


def _message_ends(p: Program, s: State, message: int) -> None:
    for end in (p.message_sender[message], p.message_receiver[message]):
        if end >= 0:
            s.pending[end] -= 1
            if s.pending[end] == 0 and (p.kind[end] != RECV or s.current[p.stream[end]] == end):
                _push(s, end)


def _finish(p: Program, s: State, step: int, time: float, events: Events) -> None:
    rank, stream = p.rank[step], p.stream[step]
    s.stop[step] = time
    s.counts[FINISHED] += 1
    if p.kind[step] != RECV and p.kind[step] != SEND:
        made = 0
        for i in range(p.makes_at[step], p.makes_at[step + 1]):
            made += _allocate(p, s, rank, p.makes[i], step)
        s.live[rank] += made
        _record(s, rank, time)
        if s.counts[FULL_RANK] >= 0:
            return
    for i in range(p.successors_at[step], p.successors_at[step + 1]):
        after = p.successors[i]
        s.waits[after] -= 1
        if s.waits[after] == 0:
            _push(s, after)
    for i in range(p.makes_at[step], p.makes_at[step + 1]):
        buffer = p.makes[i]
        if s.readers[buffer] == 0 and not p.buffer_kept[buffer]:
            _free(p, s, rank, buffer, time, events)
    for i in range(p.reads_at[step], p.reads_at[step + 1]):
        buffer = p.reads[i]
        s.readers[buffer] -= 1
        if s.readers[buffer] == 0 and not p.buffer_kept[buffer]:
            _free(p, s, rank, buffer, time, events)
    after = p.following[step]
    s.current[stream] = after
    if after >= 0:
        if p.kind[step] != RECV:
            s.waits[after] -= 1
            if s.waits[after] == 0:
                _push(s, after)
        elif s.pending[after] == 0:
            _push(s, after)


def _allocate(p: Program, s: State, rank: int, buffer: int, step: int) -> int:
    s.alive[buffer] = True
    if p.buffer_fast[buffer]:
        s.fast[rank] += p.buffer_bytes[buffer]
        if s.fast[rank] > p.limit[rank] and s.counts[FULL_RANK] < 0:
            s.counts[FULL_RANK], s.counts[FULL_STEP] = rank, step
    return p.buffer_bytes[buffer]


def _free(p: Program, s: State, rank: int, buffer: int, time: float, events: Events) -> None:
    s.alive[buffer] = False
    s.live[rank] -= p.buffer_bytes[buffer]
    if p.buffer_fast[buffer]:
        s.fast[rank] -= p.buffer_bytes[buffer]
    _record(s, rank, time)
    source = p.buffer_source[buffer]
    if source >= 0:
        s.held[source] -= 1
        if s.held[source] == 0:
            s.alive_messages[p.stream[source]] -= 1
            _post(p, s, p.stream[source], time, events)


def _post(p: Program, s: State, stream: int, time: float, events: Events) -> None:
    while s.next_post[stream] >= 0 and s.alive_messages[stream] < p.depth[stream] and s.counts[FULL_RANK] < 0:
        step = s.next_post[stream]
        rank = p.rank[step]
        s.start[step] = time
        made = 0
        for i in range(p.makes_at[step], p.makes_at[step + 1]):
            made += _allocate(p, s, rank, p.makes[i], step)
        s.live[rank] += made
        _record(s, rank, time)
        s.alive_messages[stream] += 1
        s.next_post[stream] = p.following[step]
        for i in range(p.incoming_at[step], p.incoming_at[step + 1]):
            _offer(p, s, p.incoming[i], time, events)


def _record(s: State, rank: int, time: float) -> None:
    n = s.counts[EVENTS]
    s.event_rank[n], s.event_time[n], s.event_live[n] = rank, time, s.fast[rank]
    s.counts[EVENTS] += 1
