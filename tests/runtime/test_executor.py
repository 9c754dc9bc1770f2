"""The executor: any legal schedule runs to its end with the right values, within its buffers; errors are clear."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from counterpoint.kernels.attention import Add
from counterpoint.kernels.kernel import Kernel, TensorSpec
from counterpoint.kernels.shape import Cast, Fill, Take
from counterpoint.runtime.errors import PeerFailure
from counterpoint.runtime.executor import Executor
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.check import ScheduleError, check
from counterpoint.schedule.schedule import Collective, Compute, Copy, Recv, Schedule, Send, Value
from counterpoint.schedule.timeline import Timeline
from support.ranks import Ranks

SPEC = TensorSpec((1, 3, 1, 2), "float64")


@dataclass(frozen=True, slots=True)
class Mixed(Kernel):
    """(x, y) -> 2 x + 3 y, so that a swapped or stale value shows."""

    operator: ClassVar[str] = "elementwise"

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return inputs[:1]

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (2 * inputs[0] + 3 * inputs[1],)

    def label(self) -> str:
        return "mixed"


@st.composite
def messages_and_sums(draw: st.DrawFn) -> list[Schedule]:
    """Schedules of 2 to 5 ranks: random messages, exchanges, computations on several streams, sums in place, copies.

    Written in one global order, so most are legal; depths, streams and orders of posting decide.
    """
    world_size = draw(st.integers(2, 5))
    builders = [Builder("random", rank, world_size) for rank in range(world_size)]
    values: list[list[Value]] = [[b.input("x", SPEC)] for b in builders]
    totals = [b.compute(Fill(SPEC), names=["total"])[0] for b in builders]
    for channel in ("a", "b"):
        for b in builders:
            b.depth(channel, draw(st.integers(1, 4)))
    streams = st.sampled_from(["compute", "compute", "other"])
    for _ in range(draw(st.integers(3, 25))):
        kind = draw(st.sampled_from(["send", "send", "compute", "sum", "exchange", "copy"]))
        rank = draw(st.integers(0, world_size - 1))
        b, mine = builders[rank], values[rank]
        pick = st.integers(0, len(mine) - 1).map(lambda i, mine=mine: mine[-1 - i])
        if kind == "send":
            to = draw(st.integers(0, world_size - 2).map(lambda i, rank=rank: i + (i >= rank)))
            channel, sent = draw(st.sampled_from("ab")), draw(st.lists(pick, min_size=1, max_size=2))
            b.send(sent, to, channel)
            values[to] += builders[to].recv([SPEC] * len(sent), rank, channel, ["came"] * len(sent))
        elif kind == "compute":
            mine += b.compute(Mixed(), draw(pick), draw(pick), names=["y"], stream=draw(streams))
        elif kind == "sum":
            totals[rank] = b.compute(Add(((0, 3),)), totals[rank], draw(pick))[0]
        elif kind == "copy":
            mine.append(b.copy(draw(pick), "host"))
        else:
            made = [
                {p: [values[r][-1]] for p in range(world_size) if p != r and draw(st.booleans())}
                for r in range(world_size)
            ]
            for r in range(world_size):
                recvs = {p: [("got", SPEC)] for p in range(world_size) if r in made[p]}
                for came in builders[r].collective("exchange", "g", made[r], recvs).values():
                    values[r] += came
    schedules = []
    for b, mine, total in zip(builders, values, totals, strict=True):
        for value in mine[1:]:  # whatever came is used, or it would never be freed
            total = b.compute(Add(((0, 3),)), total, value)[0]
        schedules.append(b.finish({"total": total}))
    return schedules


def interpreted(schedules: list[Schedule], inputs: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Another executor: one thread, no time, steps whenever they can; what a legal schedule must give."""
    values = [dict(x) for x in inputs]
    wires: dict[tuple[int, int, str], deque[list[Tensor]]] = defaultdict(deque)
    left = [(s.rank, [*indices]) for s in schedules for indices in s.streams.values()]
    started: set[tuple[int, int]] = set()
    moved = True
    while moved:
        moved = False
        for rank, indices in left:
            while indices:
                step, known = schedules[rank].steps[indices[0]], values[rank]
                if any(name not in known for name in step.reads):
                    break
                outgoing = [(step.to, step.inputs)] if isinstance(step, Send) else getattr(step, "sends", ())
                if (rank, indices[0]) not in started:
                    started.add((rank, indices[0]))
                    for to, names in outgoing:
                        wires[rank, to, step.channel].append([known[n].clone() for n in names])  # type: ignore[union-attr]
                incoming = (
                    [(step.source, step.outputs)] if isinstance(step, Recv) else getattr(step, "recvs", ())
                )
                if any(not wires[source, rank, step.channel] for source, _ in incoming):  # type: ignore[union-attr]
                    break
                for source, outputs in incoming:
                    came = wires[source, rank, step.channel].popleft()  # type: ignore[union-attr]
                    known.update(zip((v.name for v in outputs), came, strict=True))
                if isinstance(step, Compute):
                    made = step.kernel.run(*(known[n] for n in step.inputs))
                    known.update(zip((v.name for v in step.outputs), made, strict=True))
                elif isinstance(step, Copy):
                    known[step.output.name] = known[step.input].clone()
                indices.pop(0)
                moved = True
    assert not any(indices for _, indices in left)
    return [{key: values[s.rank][name] for key, name in s.outputs.items()} for s in schedules]


@settings(max_examples=120)
@given(messages_and_sums(), st.integers(0, 1 << 20), st.sampled_from([0.0, 0.0, 0.002]))
def test_every_legal_schedule_runs_to_its_end(schedules: list[Schedule], seed: int, jitter: float) -> None:
    try:
        check(schedules)
    except ScheduleError as error:
        assume("deadlock" not in str(error))
        raise
    random = torch.Generator().manual_seed(seed)
    inputs = [{"x": torch.randn(SPEC.shape, generator=random, dtype=torch.float64)} for _ in schedules]
    expected = interpreted(schedules, inputs)
    lines = [Timeline() for _ in schedules]
    ranks = Ranks(len(schedules), timeout=20.0, jitter=jitter, seed=seed)
    given_inputs = [
        {name: x for name, x in each.items() if any(v.name == name for v in s.inputs)}
        for each, s in zip(inputs, schedules, strict=True)
    ]
    try:
        made = ranks.run(schedules, given_inputs, lines)
    finally:
        ranks.close()
    for got, wanted in zip(made, expected, strict=True):
        assert torch.allclose(got["total"], wanted["total"], rtol=1e-12)
    for schedule, line in zip(schedules, lines, strict=True):
        assert {(schedule.rank, to): n for to, n in schedule.sent_bytes().items()} == line.bytes_by_link()
        assert len(line.spans) == len(schedule.steps)
        kept = {
            schedule.memory.root[name]
            for name in [*(v.name for v in schedule.inputs), *schedule.outputs.values()]
        }
        assert line.memory[-1].live_bytes == schedule.nbytes(kept), "something was not freed, or freed twice"
        assert min(m.live_bytes for m in line.memory) >= 0


@given(messages_and_sums(), st.data())
@settings(max_examples=60)
def test_a_schedule_with_a_step_less_is_illegal(schedules: list[Schedule], data: st.DataObject) -> None:
    """Nothing but a computation into thin air can be left out without the check seeing it."""
    try:
        check(schedules)
    except ScheduleError:
        assume(False)
    victim = data.draw(st.sampled_from(schedules))
    steps = [i for i, step in enumerate(victim.steps) if isinstance(step, Send | Recv | Collective)]
    assume(steps)
    index = data.draw(st.sampled_from(steps))
    damaged = replace(victim, steps=victim.steps[:index] + victim.steps[index + 1 :])
    with pytest.raises(ScheduleError):
        check([damaged if s is victim else s for s in schedules])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_never_more_than_depth_messages_are_alive(depth: int) -> None:
    """12 messages that are consumed one by one: the receiver's memory holds `depth` of them at most."""
    messages = 12

    def made(rank: int) -> Schedule:
        b = Builder("stream", rank, 2)
        b.depth("a", depth)
        if rank == 0:
            x = b.input("x", SPEC)
            for _ in range(messages):
                b.send([x], 1, "a")
            return b.finish({})
        total = b.compute(Fill(SPEC), names=["total"])[0]
        for came in [b.recv([SPEC], 0, "a", ["m"])[0] for _ in range(messages)]:
            total = b.compute(Add(((0, 3),)), total, came)[0]
        return b.finish({"total": total})

    schedules = [made(0), made(1)]
    check(schedules)
    ranks, lines = Ranks(2), [Timeline(), Timeline()]
    x = torch.ones(SPEC.shape, dtype=torch.float64)
    _, result = ranks.run(schedules, [{"x": x}, {}], lines)
    ranks.close()
    assert torch.equal(result["total"], messages * x)
    assert lines[1].peak_bytes(1) == (depth + 1) * SPEC.nbytes


def test_more_streams_than_a_thread_pool_is_usually_given() -> None:
    """80 receives wait for a rank that waits for a word from the 81st stream."""
    channels = [f"c{i}" for i in range(80)]

    def made(rank: int) -> Schedule:
        b = Builder("wide", rank, 2)
        x = b.input("x", SPEC)
        if rank == 0:
            word = b.recv([SPEC], 1, "word")[0]
            for channel in channels:
                b.send([word], 1, channel)
            return b.finish({})
        total = b.compute(Fill(SPEC))[0]
        for came in [b.recv([SPEC], 0, channel)[0] for channel in channels]:
            total = b.compute(Add(((0, 3),)), total, came)[0]
        b.send([x], 0, "word")
        return b.finish({"total": total})

    schedules = [made(0), made(1)]
    check(schedules)
    ranks, x = Ranks(2, timeout=10.0), torch.ones(SPEC.shape, dtype=torch.float64)
    _, result = ranks.run(schedules, [{"x": x}, {"x": x}])
    ranks.close()
    assert torch.equal(result["total"], 80 * x)


@dataclass(frozen=True, slots=True)
class Fails(Mixed):
    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        raise ArithmeticError("this kernel fails")


@pytest.mark.parametrize("stream", ["compute", "other"])
def test_a_failing_kernel_ends_the_run_with_its_own_error(stream: str) -> None:
    b = Builder("fails", 0, 2)
    x = b.input("x", SPEC)
    y = b.compute(Fails(), x, x, stream=stream)[0]
    b.send([y], 1, "a")
    came = b.recv([SPEC], 1, "a")[0]
    first = b.finish({"y": b.compute(Mixed(), y, came)[0]})
    b = Builder("waits", 1, 2)
    x = b.input("x", SPEC)
    b.send([x], 0, "a")
    second = b.finish({"y": b.recv([SPEC], 0, "a")[0]})
    check([first, second])
    ranks, x = Ranks(2), torch.ones(SPEC.shape, dtype=torch.float64)
    errors: list[BaseException | None] = [None, None]

    def run(rank: int) -> None:
        try:
            ranks.executors[rank].run((first, second)[rank], {"x": x})
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    ranks.close()
    assert isinstance(errors[0], ArithmeticError)
    assert isinstance(errors[1], PeerFailure) and errors[1].rank == 0 and errors[1].step.startswith("step ")


def test_inputs_that_do_not_fit_are_refused_by_name() -> None:
    b = Builder("needs", 0, 1)
    x = b.input("x", SPEC)
    schedule = b.finish({"y": b.compute(Take(((0, 1),)), b.compute(Cast("float32"), x)[0])[0]})
    good = torch.ones(SPEC.shape, dtype=torch.float64)
    executor = Executor(None)
    assert executor.run(schedule, {"x": good})["y"].shape == (1, 1, 1, 2)
    with pytest.raises(ValueError, match="needs an input 'x'; given are y"):
        executor.run(schedule, {"y": good})
    with pytest.raises(ValueError, match=r"x is float32\[1, 3, 1, 2\], but the schedule expects float64"):
        executor.run(schedule, {"x": good.float()})
    with pytest.raises(ValueError, match=r"x is float64\[1, 3, 2, 1\]"):
        executor.run(schedule, {"x": good.transpose(2, 3)})
