"""One degree for every sequence, as a fixed mesh has it: the baseline of all other solvers."""

from __future__ import annotations

from collections.abc import Sequence

from counterpoint.planner.batch import BatchPlan, Group, MicroBatch
from counterpoint.planner.batch_cost import BatchCost
from counterpoint.planner.batch_predict import check_fits, predict


def degrees(ranks: int) -> list[int]:
    """Powers of two up to the number of ranks, and that number."""
    return sorted({1 << i for i in range(ranks.bit_length()) if 1 << i <= ranks} | {ranks})


def static(
    lengths: Sequence[int], cost: BatchCost, *, degree: int | None = None, context: int | None = None
) -> BatchPlan:
    """Groups of one size, each with sequences of about equally many tokens in every micro-batch.

    degree: ranks of a group; default: as few (of `degrees` that divide the ranks) as hold a sequence of `context`
    tokens, by default the longest of the batch. Raises ValueError when the longest does not fit.
    """
    check_fits(lengths, cost)
    if degree is None:
        wanted = max(max(lengths), min(context or 0, cost.ranks * cost.capacity))
        degree = next(d for d in degrees(cost.ranks) if cost.ranks % d == 0 and d * cost.capacity >= wanted)
    elif not 1 <= degree <= cost.ranks or degree * cost.capacity < max(lengths):
        raise ValueError(
            f"degree {degree} does not do: {cost.ranks} ranks are there, and a group of {degree} holds "
            f"{degree * cost.capacity:,} tokens while the longest sequence has {max(lengths):,}"
        )
    count, room = cost.ranks // degree, degree * cost.capacity
    bins = pack(lengths, room, count)
    plan = [
        MicroBatch(
            tuple(
                Group(tuple(range(g * degree, (g + 1) * degree)), tuple(sequences))
                for g, sequences in enumerate(bins[start : start + count])
            )
        )
        for start in range(0, len(bins), count)
    ]
    return finish(lengths, cost, plan, "static")


def adaptive(lengths: Sequence[int], cost: BatchCost) -> BatchPlan:
    """The fastest single degree for this batch (FlexSP's per-batch adaptive baseline)."""
    check_fits(lengths, cost)
    possible = [d for d in degrees(cost.ranks) if d * cost.capacity >= max(lengths)]
    plans = [static(lengths, cost, degree=d) for d in possible]
    best = min(plans, key=lambda plan: plan.seconds)
    return BatchPlan(
        best.lengths, best.world_size, best.micro_batches, "adaptive", best.synchronous, best.seconds
    )


def pack(lengths: Sequence[int], room: int, multiple: int) -> list[list[int]]:
    """Sequences in bins of at most `room` tokens with about equal sums: a multiple of `multiple` of them if possible.

    Longest first into the emptiest bin; more bins until everything fits. Empty bins are left out.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = -(-sum(lengths) // (room * multiple)) * multiple
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        loads = [0] * count
        for i in order:
            b = min(range(count), key=loads.__getitem__)
            if loads[b] + lengths[i] > room:
                break
            bins[b].append(i)
            loads[b] += lengths[i]
        else:
            return [sorted(b) for b in bins if b]
        count += multiple


def finish(lengths: Sequence[int], cost: BatchCost, plan: Sequence[MicroBatch], solver: str) -> BatchPlan:
    """The plan with its predicted time."""
    made = BatchPlan(tuple(lengths), cost.ranks, tuple(plan), solver, cost.synchronous)
    seconds = predict(made, cost).seconds
    return BatchPlan(made.lengths, made.world_size, made.micro_batches, solver, cost.synchronous, seconds)
