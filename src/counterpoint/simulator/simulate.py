"""Executes schedules on a cluster with a virtual clock: what the runtime measures, predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from counterpoint.cluster.cluster import Cluster
from counterpoint.schedule.check import ScheduleError
from counterpoint.schedule.schedule import Collective, Compute, Recv, Schedule, Send, Step
from counterpoint.schedule.table import describe, span_name
from counterpoint.schedule.timeline import Kind, MemoryEvent, Span, Timeline
from counterpoint.simulator.compiler import Collectives, Compiler
from counterpoint.simulator.cost import Costs, KernelCosts
from counterpoint.simulator.fold import Symmetry
from counterpoint.simulator.garbage import no_garbage_collection
from counterpoint.simulator.program import Program

if TYPE_CHECKING:
    from counterpoint.simulator.engine import State


@no_garbage_collection()
def simulate(
    schedules: Sequence[Schedule],
    cluster: Cluster,
    *,
    placement: Sequence[int] | None = None,
    collectives: Collectives = "direct",
    symmetry: Symmetry | None = None,
    costs: Costs = KernelCosts,
) -> Timeline:
    """Predict what happens when the schedules of all ranks run on a cluster; time starts at 0 s.

    schedules: of all ranks, in rank order. placement: the cluster's rank for every rank of the schedules (default:
    the same number). collectives: "direct" sends the message of every pair as the runtime does; "measured" takes
    the time from the cluster's tables where it has them. symmetry (see `fold`): the schedules are those of its
    representatives only, and the timeline shows these and, where the cluster treats others worse, the last to finish.
    costs: of kernels on a device; by their work and the device's curves, unless measured times are at hand.

    Raises ValueError: more ranks than the cluster has, a placement that does not fit, a rank whose memory runs out
    (naming when and the largest values), a kernel the device has no rate for, a cluster that lacks the symmetry;
    ScheduleError (a ValueError): messages without counterpart, a deadlock.
    """
    from counterpoint.simulator.engine import run

    symmetry = symmetry or Symmetry((len(schedules),))
    places = _places(schedules, cluster, placement, symmetry)
    compiler = Compiler(cluster, places, symmetry, costs)
    for schedule in schedules:
        compiler.add(schedule)
    program = compiler.finish(collectives)
    state = run(program)
    _check(compiler, program, state)
    timeline = Timeline("simulated", pending=Prediction(compiler, state))
    timeline.meta = {"cluster": cluster.name, "ranks": symmetry.world_size, "schedule": schedules[0].name}
    if symmetry.folded:
        simulated = [symmetry.turned(s.rank, turn) for turn in compiler.turns for s in schedules]
        timeline.meta["folded"] = {"mesh": list(symmetry.mesh), "simulated_ranks": sorted(simulated)}
    return timeline


def _places(
    schedules: Sequence[Schedule], cluster: Cluster, placement: Sequence[int] | None, symmetry: Symmetry
) -> Sequence[int]:
    ranks, size = symmetry.representatives(), symmetry.world_size
    if not schedules or len(schedules) != len(ranks):
        raise ValueError(f"{len(schedules)} schedules were given for {len(ranks)} ranks; give one for each")
    for rank, schedule in zip(ranks, schedules, strict=True):
        if (schedule.rank, schedule.world_size) != (rank, size):
            raise ValueError(
                f"a schedule is for rank {schedule.rank} of {schedule.world_size} where that for rank {rank} of "
                f"{size} should stand; give the schedules of all ranks, in rank order"
            )
    if size > cluster.world_size:
        raise ValueError(
            f"the schedules are for {size} ranks, but cluster {cluster.name} has {cluster.world_size}; "
            "use fewer ranks or a larger cluster"
        )
    if placement is None:
        return range(size)
    wrong = [p for p in placement if not 0 <= p < cluster.world_size]
    if len(placement) != size or wrong or len(set(placement)) != size:
        raise ValueError(
            f"placement {list(placement)} does not fit: give {size} different ranks "
            f"between 0 and {cluster.world_size - 1}"
        )
    return placement


def _check(compiler: Compiler, program: Program, state: State) -> None:
    from counterpoint.simulator.engine import FINISHED, FULL_RANK

    if state.counts[FULL_RANK] >= 0:
        raise ValueError(_full(compiler, program, state, int(state.counts[FULL_RANK])))
    if state.counts[FINISHED] == program.rank.size:
        return
    stuck = np.flatnonzero(np.isnan(state.stop))
    ranks, firsts = np.unique(program.rank[stuck], return_index=True)
    where = [
        f"rank {rank} waits at {describe(compiler.schedules[schedule], int(stuck[first]) - base)}"
        for index, first in list(zip(ranks.tolist(), firsts.tolist(), strict=True))[:4]
        for schedule, rank, base in [compiler.place(index)]
    ]
    more = f" and {len(ranks) - 4} more ranks" if len(ranks) > 4 else ""
    raise ScheduleError(f"deadlock: {'; '.join(where)}{more}")


def _full(compiler: Compiler, program: Program, state: State, index: int) -> str:
    """The error for a rank whose memory ran out."""
    from counterpoint.simulator.engine import FULL_STEP

    step, (number, rank, base) = int(state.counts[FULL_STEP]), compiler.place(index)
    schedule, device = compiler.schedules[number], compiler.cluster.device(compiler.places[rank])
    held = [(v.nbytes, v.name) for v in schedule.inputs]
    made = program.makes[program.makes_at[base] : program.makes_at[base + len(schedule.steps)]]
    alive = [b for b in made.tolist() if state.alive[b] and program.buffer_fast[b]]
    held += [(int(program.buffer_bytes[b]), compiler.names[b % len(compiler.names)]) for b in alive]
    held.sort(key=lambda item: -item[0])
    largest = ", ".join(f"{name} ({_readable(size)})" for size, name in held[:5])
    more = f" and {len(held) - 5} more" if len(held) > 5 else ""
    when = "before its first step"
    if step >= 0:
        time = float(np.nanmax(np.concatenate([state.start, state.stop])))
        when = f"after {time:.4g} s at {describe(schedule, step - base)}"
    return (
        f"rank {rank} runs out of memory {when}: {_readable(sum(size for size, _ in held))} are needed, "
        f"{device.name} has {_readable(device.memory_bytes)}; alive are {largest}{more}. "
        "Use more ranks, fewer tokens or another strategy"
    )


def _readable(nbytes: int) -> str:
    return f"{nbytes / 1e9:.4g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.4g} MB"


class Prediction:
    """What a program did. Of copies of the schedules the first one is shown, and the one that finishes last."""

    def __init__(self, compiler: Compiler, state: State) -> None:
        self.compiler, self.state = compiler, state
        starts, stops = (column.reshape(len(compiler.turns), -1) for column in (state.start, state.stop))
        self.shown = sorted({0, int(stops.max(axis=1, initial=0.0).argmax())})
        self.start = float(starts[self.shown].min(initial=0.0 if not starts.size else np.inf))
        self.stop = float(stops[self.shown].max(initial=0.0))

    @no_garbage_collection()
    def spans(self) -> list[Span]:
        compiler, state = self.compiler, self.state
        starts, stops = state.start.tolist(), state.stop.tolist()
        flops, wire, spans = compiler.flops, compiler.wire, []
        for copy in self.shown:
            turn = compiler.turns[copy]
            there = partial(compiler.symmetry.turned, turn=turn)
            first = number = copy * len(flops)
            for schedule in compiler.schedules:
                rank = compiler.symmetry.turned(schedule.rank, turn)
                for index, step in enumerate(schedule.steps):
                    kind: Kind
                    peer, links = None, ()
                    if copy:
                        step = _turned(step, there)
                    if isinstance(step, Compute):
                        kind = "compute"
                    elif isinstance(step, Send):
                        kind, peer = "send", step.to
                    elif isinstance(step, Recv):
                        kind, peer = "recv", step.source
                    elif isinstance(step, Collective):
                        kind = "collective"
                        links = tuple((to, schedule.nbytes(names)) for to, names in step.sends)
                    else:
                        kind = "copy"
                    span = Span(
                        rank, step.stream, kind, span_name(step), starts[number], stops[number], peer,
                        wire[number - first], flops[number - first], links, schedule.phase(index),
                    )  # fmt: skip
                    spans.append(span)
                    number += 1
        order = np.lexsort(([s.rank for s in spans], [s.start for s in spans]))
        return [spans[i] for i in order.tolist()]

    @no_garbage_collection()
    def memory(self) -> list[MemoryEvent]:
        from counterpoint.simulator.engine import EVENTS

        compiler, state = self.compiler, self.state
        n, count = int(state.counts[EVENTS]), len(compiler.schedules)
        ours = np.flatnonzero(np.isin(state.event_rank[:n] // count, self.shown))
        index = state.event_rank[ours]
        number = {i: compiler.place(i)[1] for i in np.unique(index).tolist()}
        ranks = np.array([number[i] for i in index.tolist()], np.int64)
        times, live = state.event_time[ours], state.event_live[ours]
        order = np.lexsort((ranks, times))
        columns = (ranks[order].tolist(), times[order].tolist(), live[order].tolist())
        return [MemoryEvent(*row) for row in zip(*columns, strict=True)]


def _turned(step: Step, there: Callable[[int], int]) -> Step:
    """The step with its peers elsewhere."""
    if isinstance(step, Send):
        return replace(step, to=there(step.to))
    if isinstance(step, Recv):
        return replace(step, source=there(step.source))
    if isinstance(step, Collective):
        sends = tuple((there(to), names) for to, names in step.sends)
        return replace(step, sends=sends, recvs=tuple((there(source), made) for source, made in step.recvs))
    return step
