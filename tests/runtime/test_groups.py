"""Attention of groups of any ranks on the connections of one mesh, several groups at a time, in changing groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

import counterpoint
from counterpoint.planner.batch import BatchPlan, Group, MicroBatch
from counterpoint.runtime.engine import Engine
from counterpoint.schedule.timeline import Timeline
from counterpoint.strategies.sequence.layout import SequenceLayout
from support import reference
from support.plans import plans
from support.processes import Pools, mesh

HEADS, KV_HEADS, DIM = 4, 2, 8
pytestmark = pytest.mark.processes


def worst_error(rank: int, plan: BatchPlan, strategy: str) -> tuple[float, dict, dict]:
    """The largest error of this rank's results over its groups of a plan; bytes by link as two places count them."""
    engine = Engine.of(mesh(plan.world_size))
    before, line, worst = dict(engine.transport.sent), Timeline(), 0.0  # type: ignore[union-attr]
    for number, group in plan.of_rank(rank):
        lengths = tuple(plan.lengths[i] for i in group.sequences)
        layout = SequenceLayout("document-zigzag", sum(lengths), len(group.ranks), lengths)
        random = torch.Generator().manual_seed(number * 100 + group.ranks[0])
        whole = [torch.randn(1, n, layout.tokens, DIM, generator=random) for n in (HEADS, KV_HEADS, KV_HEADS)]
        dout = torch.randn(1, HEADS, layout.tokens, DIM, generator=random)
        place = group.ranks.index(rank)
        q, k, v = (layout.shard(x, place, dim=2).requires_grad_() for x in whole)
        out = counterpoint.attention(
            q, k, v, mesh=mesh(plan.world_size), ranks=group.ranks, layout=layout, forward=strategy, timeline=line
        )  # fmt: skip
        out.backward(layout.shard(dout, place, dim=2))
        seen = reference.visible(layout.tokens, True, None, lengths)
        expected = reference.attention(*(x.transpose(1, 2) for x in (*whole, dout)), seen)  # type: ignore[arg-type]
        for got, name in ((out, "out"), (q.grad, "dq"), (k.grad, "dk"), (v.grad, "dv")):
            mine = layout.shard(getattr(expected, name).transpose(1, 2), place, dim=2)
            worst = max(worst, reference.error(got.detach(), mine, 0.1))  # type: ignore[union-attr]
    sent = {(rank, to): n - before.get(to, 0) for to, n in sorted(engine.transport.sent.items())}  # type: ignore[union-attr]
    return worst, {link: n for link, n in sent.items() if n}, line.bytes_by_link()


@pytest.mark.parametrize("world_size", [4, 8])
def test_any_groups_equal_one_process(gloo: Pools, world_size: int) -> None:
    @settings(max_examples=6)
    @given(plans(world_size))
    def check(plan: BatchPlan) -> None:
        for error, sent, timed in gloo(world_size).run(worst_error, plan, "tokenring"):
            assert error < 2e-5 and sent == timed  # the timeline names ranks of the world

    check()


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "allgather", "bidirectional_ring", "rsa"])
def test_every_strategy_works_in_groups(gloo: Pools, strategy: str) -> None:
    first = MicroBatch((Group((0, 2, 3), (1, 2)), Group((1,), (3,))))
    second = MicroBatch((Group((1, 3), (0, 4)),))  # ranks 0 and 2 have nothing to do
    third = MicroBatch((Group((0, 1, 2, 3), (5,)),))
    plan = BatchPlan((1, 33, 7, 20, 2, 64), 4, (first, second, third), "by hand")
    for error, sent, timed in gloo(4).run(worst_error, plan, strategy):
        assert error < 2e-5 and sent == timed


def mistakes(rank: int) -> list[str]:
    x, said = torch.randn(1, 2, 4, 8), []
    layout = SequenceLayout("zigzag", 8, 2)
    for ranks, given_layout in (
        ((0, 2), layout), ((0, 0), layout), ((1,), layout), ((), layout), ((0, 1), "zigzag"), ((0, 1, 2), layout),
    ):  # fmt: skip
        try:
            counterpoint.attention(x, x, x, mesh=mesh(2), ranks=ranks, layout=given_layout)
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


def test_groups_that_are_none_are_refused(gloo: Pools) -> None:
    of_another, twice, alone, none, named, too_many = gloo(2).run(mistakes)[0]
    for said in (of_another, twice, none, too_many):
        assert "give different ranks from 0 to 1, at least one" in said
    assert alone == "rank 0 is not in the group [1]; call this on its ranks only"
    assert named == "ranks [0, 1] need a SequenceLayout that says who holds what, got 'zigzag'"
