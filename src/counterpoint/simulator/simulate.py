"""Executes schedules on a cluster with a virtual clock: what the runtime measures, predicted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from counterpoint.cluster.cluster import Cluster
from counterpoint.schedule.check import ScheduleError
from counterpoint.schedule.schedule import Collective, Recv, Schedule, Send
from counterpoint.schedule.table import describe, span_name
from counterpoint.schedule.timeline import Kind, MemoryEvent, Span, Timeline
from counterpoint.simulator.compiler import Collectives, Compiler
from counterpoint.simulator.engine import EVENTS, FINISHED, FULL_RANK, FULL_STEP, State, run
from counterpoint.simulator.program import Program


def simulate(
    schedules: Sequence[Schedule],
    cluster: Cluster,
    *,
    placement: Sequence[int] | None = None,
    collectives: Collectives = "direct",
) -> Timeline:
    """Predict what happens when the schedules of all ranks run on a cluster; time starts at 0 s.

    schedules: of all ranks, in rank order. placement: the cluster's rank for every rank of the schedules (default:
    the same number). collectives: "direct" sends the message of every pair as the runtime does; "measured" takes the
    time from the cluster's tables where it has them.

    Raises ValueError: more ranks than the cluster has, a placement that does not fit, a rank whose memory runs out
    (naming when and the largest values), a kernel the device has no rate for; ScheduleError (a ValueError): messages
    without counterpart, a deadlock.
    """
    places = _places(schedules, cluster, placement)
    compiler = Compiler(cluster, places)
    for schedule in schedules:
        compiler.add(schedule)
    program = compiler.finish(schedules, collectives)
    state = run(program)
    _check(schedules, cluster, compiler, program, state)
    timeline = Timeline("simulated", _spans(schedules, compiler, state), _memory(state))
    timeline.meta = {"cluster": cluster.name, "ranks": len(schedules), "schedule": schedules[0].name}
    return timeline


def _places(
    schedules: Sequence[Schedule], cluster: Cluster, placement: Sequence[int] | None
) -> Sequence[int]:
    for rank, schedule in enumerate(schedules):
        if (schedule.rank, schedule.world_size) != (rank, len(schedules)):
            raise ValueError(
                f"schedule {rank} of {len(schedules)} is for rank {schedule.rank} of {schedule.world_size}; "
                "give the schedules of all ranks, in rank order"
            )
    if not schedules:
        raise ValueError("no schedules were given; give those of all ranks, in rank order")
    if len(schedules) > cluster.world_size:
        raise ValueError(
            f"the schedules are for {len(schedules)} ranks, but cluster {cluster.name} has {cluster.world_size}; "
            "use fewer ranks or a larger cluster"
        )
    if placement is None:
        return range(len(schedules))
    wrong = [p for p in placement if not 0 <= p < cluster.world_size]
    if len(placement) != len(schedules) or wrong or len(set(placement)) != len(placement):
        raise ValueError(
            f"placement {list(placement)} does not fit: give {len(schedules)} different ranks "
            f"between 0 and {cluster.world_size - 1}"
        )
    return placement


def _check(
    schedules: Sequence[Schedule], cluster: Cluster, compiler: Compiler, program: Program, state: State
) -> None:
    rank = int(state.counts[FULL_RANK])
    if rank >= 0:
        raise ValueError(_full(schedules, cluster, compiler, program, state, rank))
    if state.counts[FINISHED] == program.rank.size:
        return
    stuck = np.flatnonzero(np.isnan(state.stop))
    ranks, firsts = np.unique(program.rank[stuck], return_index=True)
    base = np.searchsorted(program.rank, ranks)
    where = [
        f"rank {rank} waits at {describe(schedules[rank], int(stuck[first] - start))}"
        for rank, first, start in list(zip(ranks, firsts, base, strict=True))[:4]
    ]
    more = f" and {len(ranks) - 4} more ranks" if len(ranks) > 4 else ""
    raise ScheduleError(f"deadlock: {'; '.join(where)}{more}")


def _full(
    schedules: Sequence[Schedule],
    cluster: Cluster,
    compiler: Compiler,
    program: Program,
    state: State,
    rank: int,
) -> str:
    """The error for a rank whose memory ran out."""
    step, schedule = int(state.counts[FULL_STEP]), schedules[rank]
    device = cluster.device(compiler.places[rank])
    held = [(v.nbytes, v.name) for v in schedule.inputs]
    first = int(np.searchsorted(program.rank, rank))
    last = int(np.searchsorted(program.rank, rank, side="right"))
    made = program.makes[program.makes_at[first] : program.makes_at[last]]
    held += [
        (int(program.buffer_bytes[b]), compiler.names[b])
        for b in made
        if state.alive[b] and program.buffer_fast[b]
    ]
    held.sort(reverse=True)
    largest = ", ".join(f"{name} ({_gigabytes(size)})" for size, name in held[:5])
    more = f" and {len(held) - 5} more" if len(held) > 5 else ""
    when = "before its first step"
    if step >= 0:
        time = float(np.nanmax(np.concatenate([state.start, state.stop])))
        when = f"after {time:.4g} s at {describe(schedule, step - first)}"
    return (
        f"rank {rank} runs out of memory {when}: {_gigabytes(sum(size for size, _ in held))} are needed, "
        f"{device.name} has {_gigabytes(device.memory_bytes)}; alive are {largest}{more}. "
        "Use more ranks, fewer tokens or another strategy"
    )


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.4g} GB"


def _spans(schedules: Sequence[Schedule], compiler: Compiler, state: State) -> list[Span]:
    starts, stops, flops = state.start.tolist(), state.stop.tolist(), compiler.flops
    spans, number = [], 0
    for schedule in schedules:
        rank = schedule.rank
        for step in schedule.steps:
            peer, nbytes, links = None, 0, ()
            if isinstance(step, Send):
                peer, nbytes = step.to, schedule.nbytes(step.inputs)
            elif isinstance(step, Recv):
                peer, nbytes = step.source, sum(v.nbytes for v in step.outputs)
            elif isinstance(step, Collective):
                links = tuple((to, schedule.nbytes(names)) for to, names in step.sends)
                nbytes = sum(n for _, n in links)
            kind: Kind = type(step).__name__.lower()  # type: ignore[assignment]
            spans.append(
                Span(
                    rank, step.stream, kind, span_name(step), starts[number], stops[number], peer, nbytes,
                    flops[number], links,
                )
            )  # fmt: skip
            number += 1
    spans.sort(key=lambda s: (s.start, s.rank))
    return spans


def _memory(state: State) -> list[MemoryEvent]:
    n = int(state.counts[EVENTS])
    order = np.lexsort((np.arange(n), state.event_rank[:n], state.event_time[:n]))
    columns = (state.event_rank[order], state.event_time[order], state.event_live[order])
    return [MemoryEvent(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]
