"""A schedule written into another one: the same results, bytes and depths, under other names and on other ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.kernels.kernel import TensorSpec
from counterpoint.kernels.shape import Cast
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.check import check
from counterpoint.schedule.schedule import Schedule
from counterpoint.schedule.store import from_json, to_json
from counterpoint.strategies.sequence.attention import AttentionProblem, forward_schedule, parse_choices
from counterpoint.strategies.sequence.blocks import AttentionShape
from counterpoint.strategies.sequence.layout import SequenceLayout
from support.ranks import run_ranks

NAMES = ("tokenring(packets=2)", "ring", "allgather", "ulysses", "ring/tokenring")


def problem(name: str, tokens: int) -> AttentionProblem:
    mesh = (2, 2) if "/" in name else (2,)
    choices, n = parse_choices(name), 2 * len(mesh)
    return AttentionProblem(
        AttentionShape(1, 4, 4, 8), SequenceLayout("zigzag", tokens, n), mesh, choices, choices
    )


def twice(p: AttentionProblem, rank: int, ranks: list[int], world_size: int) -> Schedule:
    """Two layers of the same attention, the second one's queries being the first one's outputs."""
    b = Builder("twice", ranks[rank], world_size)
    inner = forward_schedule(p, rank)
    given = {v.name: b.input(v.name, v.spec) for v in inner.inputs}
    for layer in range(2):
        b.phase = f"layer {layer}"
        made = b.inline(inner, given, f"layer {layer}/", ranks)
        given = {**given, "q": made["out"]}
    return b.finish({"out": given["q"]})


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(NAMES), st.integers(9, 40))
def test_two_layers_inlined_equal_two_runs(name: str, tokens: int) -> None:
    p = problem(name, tokens)
    n = p.layout.world_size
    schedules = [twice(p, r, list(range(n)), n) for r in range(n)]
    check(schedules)
    inputs = [{v.name: torch.randn(v.spec.shape) for v in s.inputs} for s in schedules]
    once = [forward_schedule(p, r) for r in range(n)]
    first = run_ranks(once, inputs)
    second = run_ranks(once, [{**x, "q": made["out"]} for x, made in zip(inputs, first, strict=True)])
    for made, wanted in zip(run_ranks(schedules, inputs), second, strict=True):
        assert torch.equal(made["out"], wanted["out"])
    for schedule, inner in zip(schedules, once, strict=True):
        assert schedule.sent_bytes() == {to: 2 * size for to, size in inner.sent_bytes().items()}
        assert all(schedule.depth(channel) == inner.depth(channel) for channel in inner.depths)
        assert set(schedule.phases) == {"layer 0", "layer 1"}
        assert from_json(to_json(schedule)) == schedule


def test_ranks_are_translated() -> None:
    p = problem("tokenring", 16)
    schedule = twice(p, 1, [4, 7], 8)
    assert (schedule.rank, schedule.world_size) == (7, 8)
    assert set(schedule.sent_bytes()) == {4}


def test_refusals_say_what_is_wrong() -> None:
    inner = forward_schedule(problem("ring", 16), 0)
    b = Builder("outer", 0, 2)
    given = {v.name: b.input(v.name, v.spec) for v in inner.inputs}
    with pytest.raises(ValueError, match="needs an input 'q'"):
        b.inline(inner, {k: v for k, v in given.items() if k != "q"}, "a/")
    (wrong,) = b.compute(Cast("bfloat16"), given["q"])
    with pytest.raises(ValueError, match="q is bfloat16"):
        b.inline(inner, {**given, "q": wrong}, "a/")
    with pytest.raises(ValueError, match="do not make that rank 0"):
        b.inline(inner, given, "a/", [1, 0])
    b.inline(inner, given, "a/")
    with pytest.raises(ValueError, match="choose another"):
        b.inline(inner, given, "a/")


def test_phases_follow_the_steps_that_are_kept() -> None:
    b = Builder("phases", 0, 1)
    x = b.input("x", TensorSpec((2, 2)))
    b.phase = "unused"
    b.compute(Cast("bfloat16"), x)
    b.phase = "used"
    (y,) = b.compute(Cast("float16"), x)
    schedule = b.finish({"y": y})
    assert schedule.phases == ("used",) and schedule.phase(0) == "used"
