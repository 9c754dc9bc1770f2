"""A whole plan as one schedule per rank: legal, the same to both executors, and as many bytes as its groups send."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings

from counterpoint.cluster.presets import find_cluster
from counterpoint.model.config import ModelConfig
from counterpoint.planner.batch import BatchPlan, Group, MicroBatch
from counterpoint.planner.batch_schedule import Products, batch_schedule, group_problem
from counterpoint.schedule.check import check
from counterpoint.schedule.schedule import Compute
from counterpoint.schedule.timeline import Timeline
from counterpoint.simulator.simulate import simulate
from counterpoint.strategies.sequence.attention import backward_schedule, forward_schedule
from counterpoint.strategies.sequence.blocks import AttentionShape
from support.plans import plans
from support.ranks import run_ranks

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip


def schedules_of(plan: BatchPlan, strategy: str):
    return [
        batch_schedule(plan, MODEL, rank, strategy=strategy, dtype="float32")
        for rank in range(plan.world_size)
    ]


@settings(max_examples=10)
@given(plans(4))
def test_any_plan_runs_as_it_is_simulated(plan: BatchPlan):
    for strategy in ("ulysses", "tokenring"):
        schedules = schedules_of(plan, strategy)
        check(schedules)
        lines = [Timeline() for _ in schedules]
        run_ranks(schedules, [{} for _ in schedules], lines)
        measured, simulated = Timeline.merge(lines), simulate(schedules, find_cluster("dgx-h100"))
        steps = [
            Counter((s.rank, s.stream, s.name, s.peer, s.nbytes) for s in t.spans)
            for t in (measured, simulated)
        ]
        assert steps[0] == steps[1]
        assert measured.bytes_by_link() == simulated.bytes_by_link() == expected_bytes(plan, strategy)


def expected_bytes(plan: BatchPlan, strategy: str) -> dict[tuple[int, int], int]:
    total: Counter[tuple[int, int]] = Counter()
    for row in plan.micro_batches:
        for group in row.groups:
            problem = group_problem(plan, group, AttentionShape(1, 4, 2, 8, "float32"), strategy)
            for write in (forward_schedule, backward_schedule):
                for place, rank in enumerate(group.ranks):
                    for to, nbytes in write(problem, place).sent_bytes().items():
                        total[rank, group.ranks[to]] += nbytes
    return dict(sorted(total.items()))


def test_a_rank_works_through_its_groups_in_order_and_waits_for_nothing_else():
    """Rank 0 has two groups of its own while ranks 1 and 2 share one; rank 3 has nothing to do."""
    first = MicroBatch((Group((0,), (0,)), Group((1, 2), (1,))))
    plan = BatchPlan((64, 512, 96), 4, (first, MicroBatch((Group((0,), (2,)),))), "by hand")
    schedules = schedules_of(plan, "ring")
    assert not schedules[3].steps
    products = [
        s.kernel for s in schedules[0].steps if isinstance(s, Compute) and isinstance(s.kernel, Products)
    ]
    assert [kernel.tokens for kernel in products] == [64] * 4 + [96] * 4
    parameters = 32 * (4 + 2 * 2) * 8 + 32 * (4 * 8 + 3 * 48)
    assert (
        sum(kernel.work().flops for kernel in products[:4]) == 2 * 64 * 3 * parameters
    )  # backward twice forward
    line = simulate(schedules, find_cluster("dgx-h100"))
    alone = [s for s in line.spans if s.rank == 0]
    assert all(s.kind == "compute" for s in alone)
    assert sum(s.seconds for s in alone) > 0.999 * max(s.stop for s in alone)  # without a gap
