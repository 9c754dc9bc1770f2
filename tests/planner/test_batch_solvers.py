"""ByteScale, dynamic context parallelism and the table of all solvers: valid plans, balance, plain errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.planner.batch_predict import check_memory, predict
from counterpoint.planner.batch_solvers.bytescale import (
    BytescaleOptions,
    _least_loaded,
    bytescale,
    need,
    nice,
)
from counterpoint.planner.batch_solvers.dynamic_cp import dynamic_cp
from counterpoint.planner.batch_solvers.static import static
from counterpoint.planner.lengths import DISTRIBUTIONS, find_distribution, read_lengths, shares
from counterpoint.planner.plan_batch import plan_batch, reason, solvers
from support.batches import small_cost

LENGTHS = st.lists(st.integers(1, 4096), min_size=1, max_size=40)
LONG = st.lists(st.integers(4097, 24 * 4096), max_size=4)


@settings(max_examples=40, deadline=None)
@given(
    LENGTHS, LONG, st.sampled_from(["zero1", "zero3"]), st.sampled_from(["none", "dp", "pp"]), st.booleans()
)
def test_plans_are_valid(short: list[int], long: list[int], state: str, balance: str, offload: bool) -> None:
    cost, lengths = small_cost(24, state=state, strategy="ring"), short + long
    plans = [bytescale(lengths, cost, BytescaleOptions(offload, balance)), dynamic_cp(lengths, cost)]  # type: ignore[arg-type]
    for plan in plans:
        check_memory(plan, cost)
        found = predict(plan, cost)
        assert found.compute + found.communication + found.idle == pytest.approx(found.seconds)
        last: dict[int, float] = {}
        for bar in sorted(found.bars, key=lambda bar: bar.micro_batch):
            for rank in bar.group.ranks:  # a rank does one thing at a time
                assert bar.start >= last.get(rank, 0.0) - 1e-9
                last[rank] = bar.stop


@pytest.mark.parametrize("name", ["github-like", "byted-like"])
def test_ranks_are_balanced_within_five_percent(name: str) -> None:
    cost = small_cost(64, state="zero1", strategy="ring")
    lengths = find_distribution(name).draw(4096, 131072, seed=1)
    found = predict(bytescale(lengths, cost), cost)
    busy = np.zeros(64)
    for bar in found.bars:
        busy[list(bar.group.ranks)] += bar.compute + bar.communication
    assert busy.max() / busy.mean() <= 1.05
    naive = predict(bytescale(lengths, cost, BytescaleOptions(offload=False, balance="none")), cost)
    fixed = predict(static(lengths, cost, context=131072), cost)
    assert found.seconds < naive.seconds < fixed.seconds


@settings(max_examples=25, deadline=None)
@given(LENGTHS, LONG, st.sampled_from(["zero1", "zero3"]), st.sampled_from(["none", "dp", "pp"]))
def test_offload_is_never_chosen_where_it_is_slower(
    short: list[int], long: list[int], state: str, balance: str
) -> None:
    cost, lengths = small_cost(24, state=state, strategy="ring"), short + long
    without, free = (bytescale(lengths, cost, BytescaleOptions(o, balance)) for o in (False, True))  # type: ignore[arg-type]
    assert free.seconds <= without.seconds * (1 + 1e-12)
    assert all(g.offload == 0 for row in without.micro_batches for g in row.groups)


def test_without_offload_a_sequence_may_not_fit() -> None:
    cost = small_cost(8, state="zero1", strategy="ring")
    lengths = [8 * 4096 + 1, 10]
    assert any(g.offload for row in bytescale(lengths, cost).micro_batches for g in row.groups)
    with pytest.raises(ValueError, match="sequence 0 has 32,769 tokens"):
        bytescale(lengths, cost, BytescaleOptions(offload=False))


@given(st.integers(1, 40), st.integers(1, 4), st.lists(st.floats(0, 9), min_size=40, max_size=40))
def test_groups_lie_where_the_load_is_least(size: int, nodes: int, loads: list[float]) -> None:
    cost = small_cost(8 * nodes)
    given = np.array(loads[: cost.ranks])
    size = nice(min(size, cost.ranks), cost)
    start = _least_loaded(given, size, cost)
    starts = [s for s in range(cost.ranks - size + 1) if (s % 8 + size <= 8 if size <= 8 else s % 8 == 0)]
    assert start in starts
    assert given[start : start + size].max() == min(given[s : s + size].max() for s in starts)


def test_offload_takes_what_computing_hides() -> None:
    cost = small_cost(64, state="zero1", strategy="ring")
    short, long = need(0, 5000, cost, True), need(0, 200_000, cost, True)
    assert 0 < short.offload < long.offload <= 1.0  # attention grows faster than activations
    assert long.ranks < need(0, 200_000, cost, False).ranks == 56
    plan = bytescale([200_000] + [1000] * 64, cost)
    group = next(g for row in plan.micro_batches for g in row.groups if 0 in g.sequences)
    alone, _ = cost.group(group.ranks).seconds([200_000])
    late = cost.offload_seconds(200_000 / len(group.ranks), group.offload, alone)
    assert late <= 0.02 * alone


def test_every_solver_answers_and_the_fastest_is_first() -> None:
    cost = small_cost(8)
    lengths = find_distribution("commoncrawl-like").draw(60, 30_000, seed=0)
    answers = plan_batch(lengths, [[cost]], solvers(cost))
    assert all(a.plan is not None and a.prediction is not None for a in answers)
    times = [a.prediction.seconds for a in answers if a.prediction]
    assert times == sorted(times)
    assert reason(answers).startswith(answers[0].solver)


@pytest.mark.parametrize("known", DISTRIBUTIONS, ids=lambda d: d.name)
def test_distributions_have_the_stated_tails(known) -> None:
    assert known.draw(100, 65536, 3) == known.draw(100, 65536, 3)
    assert known.draw(100, 65536, 3) != known.draw(100, 65536, 4)
    lengths = known.draw(200_000, 2_097_152, 0)
    if known.name == "wikipedia-like":
        assert shares(lengths, 8192)[0] < 0.04
    if known.name == "github-like":
        assert shares(lengths, 131072)[1] == pytest.approx(0.162, abs=0.03)
        assert shares(lengths, 262144)[1] == pytest.approx(0.098, abs=0.03)
    if known.name == "byted-like":
        assert shares(lengths, 4096)[0] == pytest.approx(0.2, abs=0.05)
        assert shares(lengths, 131072)[1] == pytest.approx(0.443, abs=0.05)
        assert shares(lengths, 131072)[0] == pytest.approx(0.01, abs=0.003)
        assert shares(lengths, 262144)[1] == pytest.approx(0.37, abs=0.03)


def test_files_of_lengths(tmp_path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("5, 6\n7 8\n")
    assert read_lengths(path) == [5, 6, 7, 8]
    path.write_text("[1, 2]")
    assert read_lengths(path) == [1, 2]
    for text, message in (
        ("", "the batch is empty"), ("3 x", "line 1: 'x' is not a whole number"), ("3 0", "sequence 1 has length 0"),
        ("[1, 2.5]", "sequence 1 has length 2.5"), ("[1,", "not a JSON list"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_lengths(path)


def test_a_sequence_that_fits_only_with_offloading_is_placed() -> None:
    """Whatever lies between what ranks hold and what they hold with all that host memory takes."""
    cost = small_cost(4, state="zero1", strategy="ring")
    held, most = (cost.ranks * cost.capacity_with(r) for r in (0.0, cost.most_offload))
    for length in [*np.random.default_rng(0).integers(held + 1, most + 1, 8).tolist(), most]:
        plan = bytescale([length, 100], cost)
        (group,) = (g for row in plan.micro_batches for g in row.groups if 0 in g.sequences)
        assert group.offload <= cost.most_offload and length <= len(group.ranks) * cost.capacity_with(
            group.offload
        )
        assert plan_batch([length, 100], [[cost]], {"bytescale": bytescale})[0].plan is not None
    with pytest.raises(
        ValueError, match=rf"sequence 0 has {most + 1:,} tokens; 4 ranks hold .*{most:,} in all"
    ):
        bytescale([most + 1, 100], cost)


def test_a_sequence_that_fits_nowhere() -> None:
    with pytest.raises(ValueError, match=r"sequence 1 has 9,000,000 tokens; 8 ranks hold"):
        plan_batch([5, 9_000_000], [[small_cost(8)]])
