"""FlexSP: plans are valid, the MILP finds what exhaustive search finds, and mixed groups beat a fixed degree."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.planner.batch import BatchPlan
from counterpoint.planner.batch_cost import BatchCost
from counterpoint.planner.batch_predict import check_memory, predict
from counterpoint.planner.batch_solvers.assignment import Task, search
from counterpoint.planner.batch_solvers.flexsp import FlexspOptions, flexsp
from counterpoint.planner.batch_solvers.flexsp_milp import MicroBatchMilp
from counterpoint.planner.batch_solvers.static import adaptive, static
from support.batches import small_cost

QUICK = FlexspOptions(tries=2, effort=0)


def brute_force(task: Task) -> float:
    """Least time of the slowest group over all compositions of powers of two and all assignments."""
    best = float("inf")
    for sizes in [(4,), (2, 2), (2, 1, 1), (1, 1, 1, 1)]:
        for choice in product(range(len(sizes)), repeat=len(task.lengths)):
            slowest = 0.0
            for g, d in enumerate(sizes):
                members = [k for k, c in enumerate(choice) if c == g]
                if members and task.lengths[members].sum() > d * task.capacity:
                    slowest = float("inf")
                    break
                if members:
                    slowest = max(slowest, task.seconds(d, members))
            best = min(best, slowest)
    return best


@pytest.mark.parametrize("seed", range(3))
def test_the_milp_equals_brute_force(seed: int) -> None:
    cost = small_cost(4, state="zero1" if seed else "zero3")
    rng = np.random.default_rng(seed)
    lengths = [int(x) for x in rng.integers(64, 3000, 5 + 2 * (seed == 0))] + [4096 + 500 * seed]
    task = Task.of(range(len(lengths)), lengths, cost)
    found = search(task)
    assert found is not None
    model = MicroBatchMilp(task, cost, buckets=len(lengths))
    result = model.program.solve(gap=1e-9, start=model.start(found))
    assert result.status == "optimal"
    assert result.values is not None
    expected = brute_force(task)
    assert result.objective == pytest.approx(expected, rel=1e-6)
    assert model.assignment(result.values).seconds == pytest.approx(expected, rel=1e-6)
    assert found.seconds >= expected * (1 - 1e-9)
    gaps = [p.gap for p in result.trajectory]
    assert gaps == sorted(gaps, reverse=True)


def test_the_bound_of_64_ranks_is_close() -> None:
    """All ranks together bound the time: without that the relaxation spreads over groups that cannot all exist."""
    cost = small_cost(64)
    lengths = [int(x) for x in np.minimum(np.random.default_rng(5).lognormal(8, 0.8, 30), 50_000)]
    task = Task.of(range(30), lengths, cost)
    found = search(task)
    assert found is not None
    model = MicroBatchMilp(task, cost)
    start = model.start(found)
    assert start is not None
    result = model.program.solve(checks=20, gap=1e-6, start=start, seconds=60)
    work = sum(min(d * task.seconds(d, [k]) for d in task.costs) for k in range(30)) / 64
    assert 0.8 * work <= result.bound <= result.objective <= start[model.slowest] * (1 + 1e-9)
    assert result.gap < 0.15


LENGTHS = st.lists(st.integers(1, 4000), min_size=1, max_size=40)
LONG = st.lists(st.integers(4096, 32768), max_size=2)


def check(plan: BatchPlan, cost: BatchCost, lengths: list[int]) -> None:
    """Groups disjoint and each sequence once (the plan's own check), memory of every rank, and a whole prediction."""
    assert plan.lengths == tuple(lengths)
    check_memory(plan, cost)
    found = predict(plan, cost)
    assert found.seconds == pytest.approx(plan.seconds)
    assert found.compute + found.communication + found.idle == pytest.approx(found.seconds)
    assert found.seconds >= max(bar.stop for bar in found.bars) * (1 - 1e-9)


@settings(max_examples=25, deadline=None)
@given(LENGTHS, LONG, st.sampled_from(["zero1", "zero3"]))
def test_plans_are_valid(lengths: list[int], long: list[int], state: str) -> None:
    cost, lengths = small_cost(8, state=state), lengths + long
    for solver in (lambda s, c: flexsp(s, c, QUICK), static, adaptive):
        check(solver(lengths, cost), cost, lengths)


def test_the_milp_only_improves_a_plan_and_gives_the_same_one_again() -> None:
    cost = small_cost(8)
    rng = np.random.default_rng(3)
    lengths = [int(x) for x in np.minimum(rng.lognormal(6, 1.5, 40) + 1, 20000)]
    quick = flexsp(lengths, cost, FlexspOptions(tries=2, effort=0))
    better = [flexsp(lengths, cost, FlexspOptions(tries=2, effort=30, milp_seconds=60)) for _ in range(2)]
    check(better[0], cost, lengths)
    assert better[0].seconds <= quick.seconds
    assert better[0] == better[1]


def test_mixed_groups_beat_a_degree_that_fits_the_longest() -> None:
    cost = small_cost(16)
    lengths = [60_000] + [500] * 900
    assert flexsp(lengths, cost, QUICK).seconds < 0.9 * static(lengths, cost, context=64_000).seconds


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([], "the batch is empty"),
        ([10, 0], "sequence 1 has length 0"),
        (
            [10, 40_000],
            r"sequence 1 has 40,000 tokens; 8 ranks hold 4,096 tokens each, 32,768 in all.*use 10 ranks",
        ),
    ],
)
def test_impossible_batches_are_refused(lengths: list[int], message: str) -> None:
    for solver in (flexsp, static, adaptive):
        with pytest.raises(ValueError, match=message):
            solver(lengths, small_cost(8))
