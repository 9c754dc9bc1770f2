"""Changing the layout of a sharded tensor: every token arrives, only tokens that must move are sent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.kernels.kernel import TensorSpec
from counterpoint.kernels.tokens import Run
from counterpoint.schedule.check import check
from counterpoint.strategies.sequence.layout import LAYOUTS, SequenceLayout
from counterpoint.strategies.sequence.relayout import intersection, relayout_schedule
from support.ranks import run_ranks

runs = st.builds(Run, st.integers(0, 20), st.integers(1, 9), st.integers(1, 6))


@given(runs, runs)
def test_intersection_of_runs_is_that_of_their_positions(a: Run, b: Run) -> None:
    both = intersection(a, b)
    positions = set(range(a.start, a.last + 1, a.step)) & set(range(b.start, b.last + 1, b.step))
    found = set() if both is None else set(range(both.start, both.last + 1, both.step))
    assert found == positions


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS), st.integers(1, 50), st.integers(1, 6), st.randoms()
)
def test_every_token_arrives_and_only_those_that_move_are_sent(
    first, second, tokens, world_size, random
) -> None:
    cut = random.randint(1, tokens)
    documents = (cut, tokens - cut) if cut < tokens else ()
    source, target = (SequenceLayout(kind, tokens, world_size, documents) for kind in (first, second))
    x = torch.randn(2, tokens, 3)
    spec = TensorSpec((2, 0, 3))
    schedules = [relayout_schedule(spec, source, target, rank) for rank in range(world_size)]
    check(schedules)
    inputs = [{"x": source.shard(x, rank)} for rank in range(world_size)]
    made = run_ranks(schedules, inputs)
    for rank in range(world_size):
        expected = target.shard(x, rank)
        assert torch.equal(made[rank]["y"] if expected.shape[1] else expected, expected)
        moving = set(source.local(rank).positions()) - set(target.local(rank).positions())
        assert sum(schedules[rank].sent_bytes().values()) == len(moving) * 2 * 3 * 4


def test_layouts_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="8 tokens on 2 ranks and 9 tokens on 2 ranks"):
        relayout_schedule(
            TensorSpec((1, 0)), SequenceLayout("zigzag", 8, 2), SequenceLayout("zigzag", 9, 2), 0
        )
