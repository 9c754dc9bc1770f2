"""What a run records: categories cover the wall time, bytes are counted once, memory is that of the living values."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.runtime.executor import Executor
from counterpoint.schedule.schedule import Compute, Schedule
from counterpoint.schedule.timeline import MemoryEvent, Span, Timeline
from counterpoint.strategies.sequence.attention import backward_schedule, forward_schedule
from support.cases import Case, run_case
from support.grid import STRATEGIES

RESOLUTION = 1000  # instants of a sampled timeline


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    """Spans of three ranks on whole ticks, overlapping as they like."""
    line = Timeline()
    for _ in range(draw(st.integers(1, 25))):
        rank, kind = (
            draw(st.integers(0, 2)),
            draw(st.sampled_from(["compute", "copy", "send", "recv", "collective"])),
        )
        start = draw(st.integers(0, RESOLUTION - 1))
        stop = draw(st.integers(start, RESOLUTION))
        peer = (rank + draw(st.integers(1, 2))) % 3
        nbytes = draw(st.integers(0, 100)) if kind in ("send", "recv", "collective") else 0
        collective = kind == "collective"
        links = ((peer, nbytes),) if collective else ()
        line.spans.append(
            Span(rank, kind, kind, "x", start, stop, None if collective else peer, nbytes, 0, links)  # type: ignore[arg-type]
        )
    return line


@given(timelines())
def test_categories_are_a_count_of_instants(line: Timeline) -> None:
    first, last = int(line.start), int(line.stop)
    for rank in line.ranks:
        expected = dict.fromkeys(("compute", "hidden", "exposed", "idle"), 0)
        mine = [s for s in line.spans if s.rank == rank]
        for tick in range(first, last):
            kinds = {s.kind for s in mine if s.start <= tick < s.stop}
            computes, talks = bool(kinds & {"compute", "copy"}), bool(kinds & {"send", "recv", "collective"})
            expected["compute"] += computes
            expected["hidden"] += computes and talks
            expected["exposed"] += talks and not computes
            expected["idle"] += not talks and not computes
        got = line.categories(rank)
        assert got == pytest.approx(expected)
        assert got["compute"] + got["exposed"] + got["idle"] == pytest.approx(line.seconds)


@given(timelines())
def test_bytes_are_counted_once_by_who_sends(line: Timeline) -> None:
    total = line.bytes_by_link()
    sent = sum(s.nbytes for s in line.spans if s.kind in ("send", "collective"))
    assert sum(total.values()) == sent
    assert (
        sum(line.bytes_sent(rank) for rank in range(3))
        == sum(line.bytes_received(rank) for rank in range(3))
        == sent
    )


@given(timelines())
def test_there_and_back(line: Timeline) -> None:
    line.memory.append(MemoryEvent(1, 3.0, 17))
    line.meta["shape"] = [1, 2]
    assert Timeline.from_json(line.to_json()) == line
    moved = line.shifted()
    assert (
        moved.start == 0 and moved.seconds == line.seconds and moved.bytes_by_link() == line.bytes_by_link()
    )
    parts = [Timeline(spans=[s for s in line.spans if s.rank == r]) for r in range(3)]
    merged = Timeline.merge(parts)
    assert sorted(map(repr, merged.spans)) == sorted(map(repr, line.spans))


def living_bytes(schedule: Schedule) -> list[int]:
    """Bytes that live while each step of a schedule of one stream runs, by looking ahead for further uses.

    The executor makes results before it frees arguments, so both count during a step.
    """
    buffer = {v.name: v.name for v in schedule.inputs}
    size = {v.name: v.nbytes for v in schedule.inputs}
    for step in schedule.steps:
        assert isinstance(step, Compute)
        for i, value in enumerate(step.outputs):
            shared = step.kernel.aliases.get(i)
            buffer[value.name] = value.name if shared is None else buffer[step.inputs[shared]]
            size.setdefault(buffer[value.name], value.nbytes)
    forever = {buffer[n] for n in (*(v.name for v in schedule.inputs), *schedule.outputs.values())}
    during = []
    for i, step in enumerate(schedule.steps):
        born = {buffer[v.name] for v in schedule.inputs} | {
            buffer[v.name] for s in schedule.steps[: i + 1] for v in s.writes
        }
        needed = {buffer[n] for s in schedule.steps[i:] for n in s.reads} | {
            buffer[v.name] for v in step.writes
        }
        during.append(sum(size[b] for b in born & (needed | forever)))
    return during


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("window", [None, 5])
def test_peak_memory_of_one_rank_is_that_of_its_living_values(strategy: str, window: int | None) -> None:
    case = Case(
        (1,), strategy, heads=4, kv_heads=2, tokens=40, window=window, documents=(15, 25), wants_lse=True
    )
    problem, whole = case.problem(), case.tensors()
    made = Executor(None).run(forward_schedule(problem, 0), whole)
    for schedule, inputs in (
        (forward_schedule(problem, 0), whole),
        (backward_schedule(problem, 0), {**whole, **made}),
    ):
        line = Timeline()
        Executor(None).run(schedule, inputs, line)
        assert line.peak_bytes(0) == max(living_bytes(schedule))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_measured_run_holds_every_step_once(strategy: str) -> None:
    outcome = run_case(Case((4,), strategy, heads=4, kv_heads=2, tokens=48))
    for schedules, lines in zip(outcome.schedules, outcome.timelines, strict=True):
        for schedule, line in zip(schedules, lines, strict=True):
            assert sorted((s.stream, s.kind) for s in line.spans) == sorted(
                (step.stream, type(step).__name__.lower()) for step in schedule.steps
            )
            for stream, indices in schedule.streams.items():
                spans = [s for s in line.spans if s.stream == stream]
                assert all(a.stop <= b.stop for a, b in itertools.pairwise(spans)), "a stream keeps its order"
                assert len(spans) == len(indices) and all(s.rank == schedule.rank for s in spans)
            flops = sum(
                step.kernel.work(*(schedule.values[n].spec for n in step.inputs)).flops
                for step in schedule.steps
                if isinstance(step, Compute)
            )
            assert sum(s.flops for s in line.spans) == flops > 0
            events = [m.live_bytes for m in line.memory]
            assert min(events) >= 0 and line.memory[0].live_bytes >= schedule.nbytes(
                v.name for v in schedule.inputs
            )


def test_nothing_is_recorded_unasked() -> None:
    case = Case((1,), "ring")
    schedule = forward_schedule(case.problem(), 0)
    plain, line = Executor(None).run(schedule, case.tensors()), Timeline()
    timed = Executor(None).run(schedule, case.tensors(), line)
    assert torch.equal(plain["out"], timed["out"])
    Executor(None).run(schedule, case.tensors())
    assert len(line.spans) == len(schedule.steps)


def test_a_timeline_that_is_asked_for_its_time_only_makes_no_spans_and_travels_whole():
    class Later:
        start, stop, asked = 1.0, 3.0, 0

        def spans(self) -> list[Span]:
            self.asked += 1
            return [
                Span(1, "compute", "compute", "a", 1.0, 3.0),
                Span(0, "compute", "compute", "b", 1.0, 2.0),
            ]

        def memory(self) -> list[MemoryEvent]:
            return [MemoryEvent(0, 1.0, 8)]

    later = Later()
    line = Timeline("simulated", meta={"ranks": 2}, pending=later)
    assert (line.seconds, later.asked) == (2.0, 0)
    copied = pickle.loads(pickle.dumps(line))
    assert copied == line == Timeline("simulated", later.spans(), later.memory(), {"ranks": 2})
    assert (line.seconds, later.asked) == (2.0, 2), "once for the pickle, once by the test"
    line.spans.pop(0)
    assert line.seconds == 1.0, "once made, spans are the timeline's own"


def test_splitting_by_rank_is_the_inverse_of_merging():
    spans = [Span(r, "compute", "compute", f"{i}", float(i), i + 1.0) for i in range(4) for r in range(3)]
    line = Timeline("simulated", spans, [MemoryEvent(r, 0.5, r) for r in range(3)], {"a": 1})
    parts = line.split()
    assert [{s.rank for s in part.spans} for part in parts.values()] == [{0}, {1}, {2}]
    assert Timeline.merge(parts.values()) == line
    assert all(part.categories(rank) == line.categories(rank) for rank, part in parts.items())
