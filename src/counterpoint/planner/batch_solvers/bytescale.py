"""Hybrid data parallelism of ByteScale (arXiv 2502.21231): a sequence takes as many ranks as it needs, of all ranks.

A rank holds up to C tokens. A sequence of more gets D(s) ranks, fewer when a share r of its activations can be moved to
the host while it computes (section 5.1); shorter ones are packed on single ranks. Naive (algorithm 1) fills ranks in
turn. Balanced (algorithm 2) evens out the time of ranks, which then run different numbers of micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np

from counterpoint.planner.batch import BatchPlan, Group, MicroBatch
from counterpoint.planner.batch_cost import BatchCost
from counterpoint.planner.batch_predict import check_fits
from counterpoint.planner.batch_solvers.static import finish

LEVELS = (1.02, 1.04, 1.06, 1.1, 1.15, 1.2, 1.35)  # up to which ranks are filled, in mean times of a rank
PIECES = (1, 2, 4, 8)  # of a mean rank's time: what one sequence may take without balance
GOOD = 1.04  # nothing better is looked for
WIDER = 1.1  # steps in which a sequence is spread further to stay below the level
Balance = Literal["none", "dp", "pp"]


@dataclass(frozen=True, slots=True)
class BytescaleOptions:
    """offload: move activations of long sequences to the host. balance: "none" (algorithm 1); "dp": micro-batches that
    run at the same time are alike; "pp": those that one rank runs in a row are."""

    offload: bool = True
    balance: Balance = "dp"


@dataclass(frozen=True, slots=True)
class Need:
    """A sequence longer than one rank holds: on how many ranks, and the share of its activations on the host."""

    sequence: int
    ranks: int
    offload: float


def bytescale(lengths: Sequence[int], cost: BatchCost, options: BytescaleOptions | None = None) -> BatchPlan:
    """The plan. Raises ValueError when a sequence does not fit all ranks together."""
    options = options or BytescaleOptions()
    can_offload = options.offload and cost.most_offload > 0
    check_fits(lengths, cost, cost.most_offload if options.offload else 0.0)
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    long = [i for i in order if lengths[i] > cost.capacity]
    short = [i for i in order if lengths[i] <= cost.capacity]
    ways = [False, True] if can_offload and long else [False]
    if lengths[order[0]] > cost.ranks * cost.capacity:
        ways = [True]
    plans = []
    for offload in ways:
        needs = [need(i, lengths[i], cost, offload) for i in long]
        if options.balance == "none":
            for pieces in PIECES:
                work = _naive(_widened(needs, pieces, lengths, cost), short, lengths, cost)
                plans.append(finish(lengths, cost, rows(work), "bytescale"))
        else:
            plans += _levelled(needs, short, lengths, cost, options.balance)
    return min(plans, key=lambda plan: plan.seconds)


def _levelled(
    needs: list[Need], short: list[int], lengths: Sequence[int], cost: BatchCost, balance: Balance
) -> list[BatchPlan]:
    """Balanced plans: for levels up to the lowest one that ranks can keep, by bisection."""
    mean, plans = _mean_seconds(needs, short, lengths, cost), []
    best, best_time, best_level = None, np.inf, LEVELS[-1]

    def fill(level: float, powers: bool) -> float:
        """The time of the last rank, in mean times."""
        nonlocal best, best_time, best_level
        work, times = _balanced(needs, short, lengths, cost, balance, level * mean, powers)
        if cost.synchronous:  # waiting for others in every micro-batch is not in these times
            plans.append(finish(lengths, cost, rows(work), "bytescale"))
        if times.max() < best_time:
            best, best_time, best_level = work, float(times.max()), level
        return float(times.max()) / mean

    low, high = 0, len(LEVELS)
    while low < high and best_time > GOOD * mean:
        middle = (low + high) // 2
        kept = fill(LEVELS[middle], False) <= LEVELS[middle]
        low, high = (low, middle) if kept else (middle + 1, high)
    if best_time > GOOD * mean:
        fill(best_level, True)
    assert best is not None
    return plans or [finish(lengths, cost, rows(best), "bytescale")]


def _mean_seconds(needs: list[Need], short: list[int], lengths: Sequence[int], cost: BatchCost) -> float:
    """What a rank takes when all take the same and no sequence more ranks than it must (s)."""
    total = float(cost.group((0,)).compute([lengths[i] for i in short]).sum())
    for n in needs:
        total += n.ranks * sum(cost.group(range(n.ranks)).seconds([lengths[n.sequence]]))
    return total / cost.ranks


def _on(n: Need, size: int, lengths: Sequence[int], cost: BatchCost) -> Need:
    """The sequence on this many ranks; nothing is moved to the host where they hold it without."""
    return Need(n.sequence, size, n.offload if lengths[n.sequence] > size * cost.capacity else 0.0)


def need(sequence: int, length: int, cost: BatchCost, offload: bool) -> Need:
    """Ranks and offload ratio of a long sequence: r = min(1, T(s) B / Act(s)), then D(s) from what is left to keep.

    T is a layer's forward pass and Act what it keeps, both of the whole sequence on one rank: shares of D ranks have
    the same proportion. A sequence that does not fit all ranks so offloads as much as it takes, and waits for it.
    """
    ratio = 0.0
    if offload and cost.offloads:
        host = cost.cluster.device(0).memory[1]
        kept = cost.layer_bytes * length
        forward = float(cost.group((0,)).compute([length])[0]) / 3 / cost.model.num_hidden_layers
        ratio = min(1.0, forward * host.attained.at(kept) / kept)
        if length > cost.ranks * cost.capacity_with(ratio):
            ratio = min(cost.most_offload, cost.offload_for(ceil(length / cost.ranks)))
    ranks = min(cost.ranks, ceil(length / cost.capacity_with(ratio)))
    return Need(sequence, nice(ranks, cost), ratio)


def nice(ranks: int, cost: BatchCost) -> int:
    """Any number of ranks inside a node; beyond it, whole nodes, in steps of at most an eighth."""
    node = cost.cluster.sizes[0]
    if ranks <= node:
        return ranks
    nodes = ceil(ranks / node)
    step = 1 << max(0, nodes.bit_length() - 4)
    return min(cost.ranks, ceil(nodes / step) * step * node)


def _sizes(ranks: int, cost: BatchCost, powers: bool) -> Iterator[int]:
    """From these on, what a sequence may be spread over."""
    size, node = min(ranks, cost.ranks), cost.cluster.sizes[0]
    while True:
        size = nice(size, cost)
        if powers and size < node:
            size = min(node, cost.ranks, 1 << (size - 1).bit_length())
        yield size
        if size == cost.ranks:
            return
        size = max(size + 1, int(size * WIDER))


def _naive(needs: list[Need], short: list[int], lengths: Sequence[int], cost: BatchCost) -> list[Group]:
    """Algorithm 1: long sequences and best-fit packs of short ones, each on the ranks with the fewest tokens so far.

    Equal numbers of tokens hide unequal attention.
    """
    packs: list[list[int]] = []
    room: list[int] = []
    for i in short:
        fits = [p for p, left in enumerate(room) if left >= lengths[i]]
        if fits:
            p = min(fits, key=lambda p: room[p])
        else:
            p = len(packs)
            packs.append([])
            room.append(cost.capacity)
        packs[p].append(i)
        room[p] -= lengths[i]
    work, tokens = [], np.zeros(cost.ranks)
    wanted = [(n.ranks, (n.sequence,), n.offload) for n in needs]
    wanted += [(1, tuple(sorted(p)), 0.0) for p in packs]
    for size, sequences, offload in wanted:
        start = _least_loaded(tokens, size, cost)
        work.append(Group(tuple(range(start, start + size)), sequences, offload))
        there = slice(start, start + size)
        tokens[there] = tokens[there].max() + sum(lengths[i] for i in sequences) / size
    return work


def _widened(needs: list[Need], pieces: int, lengths: Sequence[int], cost: BatchCost) -> list[Need]:
    """Sequences on more ranks than memory asks for, where one would take longer than the mean rank over `pieces`."""
    one = cost.group((0,))
    most = float(one.compute(lengths).sum()) / cost.ranks / pieces
    lone = one.compute([lengths[n.sequence] for n in needs]).tolist()
    return [
        _on(n, nice(min(cost.ranks, max(n.ranks, ceil(seconds / most))), cost), lengths, cost)
        for n, seconds in zip(needs, lone, strict=True)
    ]


def _balanced(
    needs: list[Need],
    short: list[int],
    lengths: Sequence[int],
    cost: BatchCost,
    balance: Balance,
    level: float,
    powers: bool,
) -> tuple[list[Group], np.ndarray]:
    """Algorithm 2: the longest first, always to the ranks with the least accumulated time, which comes with it.

    level: time (s) that no rank should exceed; a sequence is spread over as few ranks as keep it below. powers:
    groups inside a node are powers of two, which leave no gaps beside each other.
    """
    one, times, work = cost.group((0,)), np.zeros(cost.ranks), []
    lone = one.compute([lengths[n.sequence] for n in needs]) + sum(one.fixed)
    for n, seconds in zip(needs, lone.tolist(), strict=True):
        rank = int(times.argmin())
        if n.ranks == 1 and (
            times[rank] + seconds <= level or seconds < 0.1 * level
        ):  # too small to leave gaps
            work.append(Group((rank,), (n.sequence,), n.offload))
            times[rank] += seconds
            continue
        ranks, until = _spread(n, seconds, times, lengths, cost, level, powers)
        work.append(Group(ranks, (n.sequence,), _on(n, len(ranks), lengths, cost).offload))
        times[ranks[0] : ranks[-1] + 1] = until
    alone = one.compute([lengths[i] for i in short])
    alone += sum(one.fixed) * np.array([lengths[i] for i in short]) / cost.capacity
    mine: list[list[int]] = [[] for _ in range(cost.ranks)]
    for i, seconds in zip(short, alone.tolist(), strict=True):
        rank = int(times.argmin())
        mine[rank].append(i)
        times[rank] += seconds
    for rank, sequences in enumerate(mine):
        for pack in _micro_batches(sequences, lengths, cost, balance):
            work.append(Group((rank,), tuple(sorted(pack))))
    return work, times


def _spread(
    n: Need,
    lone: float,
    times: np.ndarray,
    lengths: Sequence[int],
    cost: BatchCost,
    level: float,
    powers: bool,
) -> tuple[tuple[int, ...], float]:
    """The fewest ranks that end a sequence below the level, or those that end it soonest, and when.

    lone: seconds on one rank, so that `size` ranks take at least lone / size.
    """

    def end(start: int, size: int) -> float:
        there = range(start, start + size)
        took = sum(cost.group(there).seconds([lengths[n.sequence]]))
        return float(times[start : start + size].max()) + took

    late = []
    for size in _sizes(max(n.ranks, ceil(lone / level)), cost, powers):
        start = _least_loaded(times, size, cost)
        soonest = float(times[start : start + size].max()) + lone / size
        if soonest <= level and (until := end(start, size)) <= level:
            return tuple(range(start, start + size)), until
        late.append((soonest, start, size))
    until, start, size = min((end(start, size), start, size) for _, start, size in sorted(late)[:3])
    return tuple(range(start, start + size)), until


def _micro_batches(
    sequences: list[int], lengths: Sequence[int], cost: BatchCost, balance: Balance
) -> list[list[int]]:
    """A rank's short sequences (longest first) in micro-batches of at most C tokens."""
    room = cost.capacity
    if balance == "dp":  # similar lengths together, so that ranks have similar micro-batches at the same time
        packs: list[list[int]] = []
        left = 0
        for i in sequences:
            if not packs or left < lengths[i]:
                packs.append([])
                left = room
            packs[-1].append(i)
            left -= lengths[i]
        return packs
    count = -(-sum(lengths[i] for i in sequences) // room)
    while sequences:  # long and short mixed, so that all micro-batches of a rank take equally long
        packs, loads = [[] for _ in range(count)], [0] * count
        for i in sequences:
            p = min(
                (p for p in range(count) if loads[p] + lengths[i] <= room), key=loads.__getitem__, default=-1
            )
            if p < 0:
                break
            packs[p].append(i)
            loads[p] += lengths[i]
        else:
            return [p for p in packs if p]
        count += 1
    return []


def _least_loaded(loads: np.ndarray, size: int, cost: BatchCost) -> int:
    """Where the most loaded of `size` neighbouring ranks has the least; the first such place.

    Groups lie inside a node, or begin with one.
    """
    if size == 1:
        return int(loads.argmin())
    if size == len(loads):
        return 0
    node = cost.cluster.sizes[0]
    if len(loads) % node:
        loads = np.append(loads, [np.inf] * (-len(loads) % node))
    nodes = loads.reshape(-1, node)
    if size > node:
        return node * int(_window_max(nodes.max(axis=1), size // node).argmin())
    inside = _window_max(nodes, size)
    place, offset = divmod(int(inside.argmin()), inside.shape[1])
    return place * node + offset


def _window_max(x: np.ndarray, width: int) -> np.ndarray:
    """The largest of every `width` neighbours along the last axis."""
    have = 1
    while have < width:
        step = min(have, width - have)
        x = np.maximum(x[..., : x.shape[-1] - step], x[..., step:])
        have += step
    return x


def rows(work: Sequence[Group]) -> list[MicroBatch]:
    """Groups in order, each in the first micro-batch after all earlier work of its ranks."""
    level: dict[int, int] = {}
    found: list[list[Group]] = []
    for group in work:
        row = max(level.get(rank, 0) for rank in group.ranks)
        if row == len(found):
            found.append([])
        found[row].append(group)
        level.update(dict.fromkeys(group.ranks, row + 1))
    return [MicroBatch(tuple(sorted(groups, key=lambda g: g.ranks))) for groups in found]
