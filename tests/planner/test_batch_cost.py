"""Costs of batches are fitted to simulated schedules; they meet simulations that they have not seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from counterpoint.cluster.presets import find_cluster
from counterpoint.model.linear_config import LinearLayers
from counterpoint.planner import batch_probe, layer_work
from counterpoint.planner.batch_cost import BatchCost
from counterpoint.planner.batch_linear import linear_passes
from counterpoint.planner.group_cost import MOVES
from counterpoint.planner.mixed import LINEAR_VARIANTS
from counterpoint.strategies.memory.cost import Block, saved_bytes
from counterpoint.strategies.memory.policy import LayerPolicy
from support.batches import MODEL, small_cost


def simulated(cost: BatchCost, ranks: list[int], lengths: list[int]) -> float:
    """Forward and backward of a group: every layer's schedule simulated, the rest from the device's curves."""
    strategy = cost.strategy_of(len(ranks))
    attention = sum(batch_probe.simulated(cost.shape, strategy, ranks, lengths, cost.cluster))
    tokens, device, model = -(-sum(lengths) // len(ranks)), cost.cluster.device(0), cost.model

    def both(operations: list[layer_work.Operation]) -> float:
        return sum(layer_work.seconds(device, operations, cost.dtype, backward=b) for b in (False, True))

    layer = both(layer_work.layer_operations(model, tokens, cost.dtype))
    head = both(layer_work.head_operations(model, tokens, cost.dtype))
    return model.num_hidden_layers * (attention + layer) + head


@pytest.mark.parametrize(("strategy", "ranks"), [("ulysses", 16), ("ring", 12), ("ring", 5)])
def test_unseen_mixes_are_predicted_within_six_percent(strategy: str, ranks: int) -> None:
    cost = small_cost(16, strategy=strategy, tokens_per_rank=16384)
    rng = np.random.default_rng(ranks)
    for size in sorted({1, 2, ranks}):
        for _ in range(3):
            load = rng.uniform(0.15, 1.0) * size * cost.capacity
            lengths: list[int] = []
            while sum(lengths) < load and len(lengths) < 12:
                lengths.append(
                    int(min(load - sum(lengths) + 1, rng.lognormal(rng.uniform(7, 10), 1))) + 2 * size
                )
            found = sum(cost.group(range(size)).seconds(lengths))
            expected = simulated(cost, list(range(size)), lengths)
            assert found == pytest.approx(expected, rel=0.06), (size, lengths)


def test_a_group_that_crosses_nodes_pays_for_it() -> None:
    cost = small_cost(16)
    inside, across = cost.group(range(8)), cost.group(range(4, 12))
    lengths = [4096] * 8
    assert across.seconds(lengths)[1] > 2 * inside.seconds(lengths)[1]
    assert across.seconds(lengths)[0] == pytest.approx(inside.seconds(lengths)[0])


def test_longer_context_costs_more_and_more_ranks_less() -> None:
    cost = small_cost(16)
    few, many = cost.group(range(2)), cost.group(range(8))
    assert few.compute([8192])[0] > 2 * few.compute([4096])[0]
    assert few.compute([8192])[0] > 2 * many.compute([8192])[0]


def test_recomputing_takes_time_and_makes_room() -> None:
    cluster = find_cluster("dgx-a100")
    plain, again = (BatchCost(MODEL, cluster, 8, recompute=r) for r in (False, True))
    assert again.capacity > 1.5 * plain.capacity
    extra = again.group(range(4)).compute([8192])[0] / plain.group(range(4)).compute([8192])[0]
    assert 1.2 < extra < 1.45  # a forward pass is a third of both, head and loss are not run again
    assert again.capacity_with(1.0) > again.capacity == again.capacity_with(0.0)


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="leave no room for tokens"):
        _ = BatchCost(
            replace(MODEL, num_hidden_layers=128), find_cluster("dgx-a100"), 8, state="zero1"
        ).capacity
    with pytest.raises(ValueError, match="1 to 8"):
        BatchCost(MODEL, find_cluster("dgx-a100"), 9)


HYBRID = replace(
    MODEL, model_type="counterpoint_hybrid", linear=LinearLayers(32, 128, 128, conv_kernel_dim=4),
    layer_types=("linear_attention", "full_attention", "linear_attention", "linear_attention"),
)  # fmt: skip


def test_layer_types_add_up() -> None:
    """A model of linear and softmax layers costs what its layers cost; linear ones grow with tokens alone."""
    cluster = find_cluster("dgx-a100")
    plain, hybrid = (BatchCost(m, cluster, 8, tokens_per_rank=16384) for m in (MODEL, HYBRID))
    for size in (1, 4):
        long, short = hybrid.group(range(size)).compute([65536, 1024])
        softmax, _ = plain.group(range(size)).compute([65536, 1024])
        assert 64 * short < long < softmax
        kinds = {kind.type: count for kind, count, _ in hybrid.group(range(size)).by_kind}
        assert kinds == {"linear_attention": 3, "full_attention": 1}
    few, many = (hybrid.group(range(4)).seconds([n])[1] for n in (4096, 65536))
    assert 0 < few < many  # states do not grow, the softmax layer's exchanges do


@pytest.mark.parametrize("strategy", LINEAR_VARIANTS)
def test_linear_layers_take_what_their_schedules_take(strategy: str) -> None:
    """On loads that the fit has not seen, for groups inside a node and across."""
    cost = small_cost(16, tokens_per_rank=16384)
    cost = replace(cost, model=HYBRID, linear=strategy, _groups={}, _layers={})
    device = cost.cluster.device(0)
    for ranks in (range(2), range(6), range(16)):
        for load in (0.15, 0.6, 0.95):
            tokens = int(load * cost.capacity)
            passes = linear_passes(HYBRID, cost.dtype, strategy, ranks, tokens, cost.cluster)
            kind = layer_work.LayerKind("linear_attention")
            around = sum(layer_work.layer_seconds(device, HYBRID, tokens, cost.dtype, kind))
            whole = around + sum(p.compute + p.waiting for p in passes)
            (share,) = (
                s for s in cost.group(ranks).shares([tokens * len(ranks)]) if s.name == "linear_attention"
            )
            assert share.compute + share.communication == pytest.approx(3 * whole, rel=0.06), (ranks, load)
            assert share.sent_bytes == pytest.approx(3 * sum(p.sent for p in passes))


def test_linear_layers_hold_what_they_save() -> None:
    """More than softmax layers of the same width: convolution, feature maps, decays and gate."""
    plain, hybrid = (layer_work.activation_bytes(m, "bfloat16", recompute=False) for m in (MODEL, HYBRID))
    saved = saved_bytes(Block(HYBRID, 1, 8192, "bfloat16", "fused", linear=True), LayerPolicy("keep")) / 8192
    assert hybrid == pytest.approx((3 * saved + plain) / 4, rel=1e-3) and saved > plain
    cluster = find_cluster("dgx-a100")
    assert BatchCost(HYBRID, cluster, 8).capacity < BatchCost(MODEL, cluster, 8).capacity


def test_a_ring_beside_linear_layers_pays_for_changes_of_layout() -> None:
    ring = BatchCost(HYBRID, find_cluster("dgx-a100"), 8, "ring", tokens_per_rank=16384)
    for size, moves in ((1, 0), (4, 2)):
        shares = {s.name: s for s in ring.group(range(size)).shares([8192])}
        assert (shares[MOVES].times if moves else 0) == moves and (MOVES in shares) == bool(moves)
    with_heads = ring.with_strategies("ulysses", "states").group(range(4))
    assert MOVES not in {s.name for s in with_heads.shares([8192])}
