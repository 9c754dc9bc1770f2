"""What makes a schedule illegal: every rule, and an error that names the rank and the step."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from counterpoint.kernels.attention import Add, Delta
from counterpoint.kernels.kernel import TensorSpec
from counterpoint.kernels.shape import Cast, Fill, Take
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.check import ScheduleError, check
from counterpoint.schedule.schedule import Collective, Compute, Recv, Schedule, Send, Value

SPEC = TensorSpec((1, 4, 2, 8))
ROWS = Add(((0, 4),))


def exchange(rank: int, world_size: int = 2) -> Schedule:
    """A legal schedule: x goes to the other rank, what comes from there is added to a copy of x."""
    b = Builder("exchange", rank, world_size)
    x = b.input("x", SPEC)
    total = b.compute(Cast("float32"), x, names=["total"])[0]
    b.send([x], 1 - rank, "a")
    came = b.recv([SPEC], 1 - rank, "a", ["came"])[0]
    return b.finish({"sum": b.compute(ROWS, total, came)[0]})


def pair() -> list[Schedule]:
    return [exchange(0), exchange(1)]


def step_of(schedule: Schedule, kind: type) -> int:
    return next(i for i, step in enumerate(schedule.steps) if isinstance(step, kind))


def edit(schedule: Schedule, kind: type | int, **changes) -> Schedule:
    """The schedule with its first step of a kind (or the step of that number) changed."""
    index = kind if isinstance(kind, int) else step_of(schedule, kind)
    steps = list(schedule.steps)
    steps[index] = replace(steps[index], **changes)
    return replace(schedule, steps=tuple(steps))


def without(schedule: Schedule, kind: type) -> Schedule:
    steps = list(schedule.steps)
    del steps[step_of(schedule, kind)]
    return replace(schedule, steps=tuple(steps))


def refused(schedules: list[Schedule], *said: str) -> str:
    """check() raises one line that holds all of `said`, in order, and names a rank and a step."""
    with pytest.raises(ScheduleError) as caught:
        check(schedules)
    text = str(caught.value)
    assert "\n" not in text and re.search(r"rank \d", text) and re.search(r"step \d+ \(", text), text
    assert re.search(".*".join(map(re.escape, said)), text), text
    return text


def test_the_pair_is_legal() -> None:
    check(pair())


def test_a_send_that_nobody_receives() -> None:
    a, b = pair()
    lonely = replace(without(b, Recv), outputs={"sum": "total"}, steps=without(b, Recv).steps[:-1])
    refused([a, lonely], "rank 0, step 1", "sends to rank 1, which never receives it")


def test_a_receive_that_nobody_sends() -> None:
    a, b = pair()
    refused([without(a, Send), b], "rank 1, step 2", "receives from rank 0, which never sends it")


def test_another_channel_is_no_counterpart() -> None:
    a, b = pair()
    refused([edit(a, Send, channel="b"), b], "rank 1, step 2", "receives from rank 0, which never sends")


@pytest.mark.parametrize("spec", [SPEC.cast("bfloat16"), TensorSpec((1, 4, 2, 4))])
def test_a_message_of_another_type(spec: TensorSpec) -> None:
    a, b = pair()
    wrong = edit(edit(b, Recv, outputs=(Value("came", spec),)), 3, kernel=Add(((0, 4),)))
    text = refused(
        [a, wrong], "rank 0, step 1", "sends message (float32[1, 4, 2, 8])", "rank 1 expects message"
    )
    assert str(spec) in text and "step 2" in text


def test_a_collective_against_a_collective_of_another_kind_or_against_a_message() -> None:
    def gathers(rank: int, kind: str) -> Schedule:
        b = Builder("gather", rank, 2)
        x = b.input("x", SPEC)
        came = b.collective(kind, "g", {1 - rank: [x]}, {1 - rank: [("came", SPEC)]})[1 - rank][0]
        return b.finish({"came": came})

    check([gathers(0, "all_gather"), gathers(1, "all_gather")])
    refused([gathers(0, "all_gather"), gathers(1, "all_to_all")], "sends all_gather", "expects all_to_all")
    plain = edit(edit(exchange(1), Send, channel="g"), Recv, channel="g")
    refused([gathers(0, "all_gather"), plain], "sends all_gather", "rank 1 expects message")


def test_deadlock_of_two_ranks_that_both_send_a_message_before_they_receive_one_they_need() -> None:
    def waits(rank: int) -> Schedule:
        b = Builder("cycle", rank, 2)
        came = b.recv([SPEC], 1 - rank, "a", ["came"])[0]
        b.send([came], 1 - rank, "a")
        return b.finish({})

    text = refused([waits(0), waits(1)], "deadlock", "rank 0 waits at step 0", "rank 1 waits at step 0")
    assert "recv from 1" in text and "recv from 0" in text


def test_deadlock_of_many_ranks_names_four_and_counts_the_rest() -> None:
    def waits(rank: int) -> Schedule:
        b = Builder("cycle", rank, 7)
        came = b.recv([SPEC], (rank - 1) % 7, "a", ["came"])[0]
        b.send([came], (rank + 1) % 7, "a")
        return b.finish({})

    assert "and 3 more ranks" in refused([waits(r) for r in range(7)], "deadlock")


def test_deadlock_of_messages_in_different_orders() -> None:
    """Rank 0 sends to 1, then to 2; 2 passes to 1 what it gets, and 1 takes that first: fine only if 1 posts ahead."""

    def made(rank: int, depth: int) -> Schedule:
        b = Builder("order", rank, 3)
        b.depth("a", depth)
        x = b.input("x", SPEC)
        if rank == 0:
            b.send([x], 1, "a")
            b.send([x], 2, "a")
        elif rank == 2:
            b.send(b.recv([SPEC], 0, "a", ["x0"]), 1, "a")
        else:
            first = b.recv([SPEC], 2, "a", ["first"])[0]
            second = b.recv([SPEC], 0, "a", ["second"])[0]
            return b.finish({"first": first, "second": second})
        return b.finish({})

    check([made(rank, 2) for rank in range(3)])
    refused([made(rank, 1) for rank in range(3)], "deadlock", "rank 0 waits at step 0 (a.send")


def test_deadlock_of_buffers_that_are_never_free() -> None:
    """Depth 2: the third message has no buffer while the first two wait for it."""

    def made(rank: int, messages: int) -> Schedule:
        b = Builder("buffers", rank, 2)
        if rank == 0:
            x = b.input("x", SPEC)
            for _ in range(messages):
                b.send([x], 1, "a")
            return b.finish({})
        came = [b.recv([SPEC], 0, "a", [f"m{i}"])[0] for i in range(messages)]
        total = b.compute(Fill(SPEC), names=["total"])[0]
        for value in reversed(came):
            total = b.compute(ROWS, total, value)[0]
        return b.finish({"total": total})

    check([made(rank, 2) for rank in range(2)])
    refused([made(rank, 3) for rank in range(2)], "deadlock", "rank 0 waits")


def test_a_value_read_before_it_is_defined() -> None:
    a, b = pair()
    steps = list(a.steps)
    steps = [*steps[:2], steps[3], steps[2]]
    refused([replace(a, steps=tuple(steps)), b], "rank 0, step 2", "reads 'came' before it is defined")


def test_an_output_that_nobody_defines() -> None:
    a, b = pair()
    with pytest.raises(ScheduleError, match="rank 1: output 'nothing' is never defined"):
        check([a, replace(b, outputs={"sum": "nothing"})])


@pytest.mark.parametrize("name", ["x", "total"])
def test_a_name_defined_twice(name: str) -> None:
    a, b = pair()
    refused(
        [a, edit(b, Recv, outputs=(Value(name, SPEC),))], "rank 1, step 2", f"defines {name!r} a second time"
    )


def test_a_result_that_the_kernel_does_not_make() -> None:
    a, b = pair()
    wrong = edit(a, Compute, outputs=(Value("total", SPEC.cast("float64")),))
    refused([wrong, b], "rank 0, step 0", "makes float32[1, 4, 2, 8] but declares float64[1, 4, 2, 8]")


def test_a_value_that_is_never_freed() -> None:
    a, b = pair()
    forgets = replace(b, outputs={"sum": "total"}, steps=b.steps[:-1])
    refused([a, forgets], "rank 1, step 2", "defines 'came', which nothing uses: it would never be freed")


def test_a_tensor_of_the_caller_written_to() -> None:
    b = Builder("writes", 0, 1)
    x, y = b.input("x", SPEC), b.input("y", SPEC)
    schedule = b.finish({"sum": b.compute(ROWS, x, y)[0]})
    refused([schedule], "rank 0, step 0", "writes into 'x', which belongs to the caller")


def test_a_tensor_of_the_caller_written_to_through_a_view() -> None:
    def made(rank: int) -> Schedule:
        b = Builder("view", rank, 1)
        x = b.input("x", SPEC)
        part = b.compute(Take(((0, 2),)), x)[0]
        return b.finish({"y": b.compute(Add(((0, 2),)), part, part)[0]})

    refused([made(0)], "rank 0, step 1", "writes into 'x', which belongs to the caller")


def test_a_sum_written_while_it_is_sent() -> None:
    def made(rank: int) -> Schedule:
        b = Builder("race", rank, 2)
        total = b.compute(Fill(SPEC), names=["total"])[0]
        b.send([total], 1 - rank, "a")
        came = b.recv([SPEC], 1 - rank, "a", ["came"])[0]
        return b.finish({"sum": b.compute(ROWS, total, came)[0]})

    refused(
        [made(0), made(1)], "rank 0, step 3", "writes into 'total' while step 1 (a.send", "may still read it"
    )


def test_a_sum_sent_after_it_was_written_is_legal() -> None:
    def made(rank: int) -> Schedule:
        b = Builder("no race", rank, 2)
        total = b.compute(Fill(SPEC), names=["total"])[0]
        total = b.compute(ROWS, total, b.input("x", SPEC))[0]
        b.send([total], 1 - rank, "a")
        return b.finish({"came": b.recv([SPEC], 1 - rank, "a", ["came"])[0]})

    check([made(0), made(1)])


@pytest.mark.parametrize("peer", [0, 2, -1])
def test_a_peer_that_is_no_other_rank(peer: int) -> None:
    a, b = pair()
    refused(
        [edit(a, Send, to=peer), b],
        "rank 0, step 1",
        f"names rank {peer}; allowed are the other ranks below 2",
    )


def test_ranks_out_of_order() -> None:
    a, b = pair()
    with pytest.raises(ScheduleError, match="schedule 0 of 2 says it is rank 1 of 2"):
        check([b, a])
    with pytest.raises(ScheduleError, match="schedule 0 of 1 says it is rank 0 of 2"):
        check([a])


def test_a_kernel_that_makes_several_values_may_leave_some_unused() -> None:
    b = Builder("several", 0, 1)
    x, y = b.input("x", SPEC), b.input("y", SPEC)
    delta = b.compute(Delta(), x, y, names=["delta"])[0]
    check([b.finish({"delta": delta})])


def test_messages_and_collectives_may_not_share_a_channel() -> None:
    """They run on different streams, so nothing would say which of them comes first."""

    def made(rank: int) -> Schedule:
        b = Builder("mixed", rank, 2)
        x = b.input("x", SPEC)
        b.send([x], 1 - rank, "a")
        came = b.recv([SPEC], 1 - rank, "a", ["came"])[0]
        other = b.collective("all_gather", "a", {1 - rank: [x]}, {1 - rank: [("other", SPEC)]})[1 - rank][0]
        return b.finish({"came": came, "other": other})

    assert any(isinstance(step, Collective) for step in made(0).steps)
    refused([made(0), made(1)], "rank 0, step 2", "channel 'a'")


@pytest.mark.parametrize("stream", ["a.send", "b.recv"])
def test_streams_of_messages_are_theirs_alone(stream: str) -> None:
    a, b = pair()
    refused([edit(a, Compute, stream=stream), b], "rank 0, step 0", f"runs on stream '{stream}'")
