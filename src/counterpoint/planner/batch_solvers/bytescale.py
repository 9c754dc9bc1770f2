"""Hybrid data parallelism of ByteScale (arXiv 2502.21231): a sequence takes as many ranks as it needs, of all ranks.

A rank holds up to C tokens. A sequence of more gets D(s) ranks, fewer when a share r of its activations can be moved to
the host while it computes (section 5.1); shorter ones are packed on single ranks. Naive (algorithm 1) fills ranks in
turn. Balanced (algorithm 2) evens out the time of ranks, which then run different numbers of micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np

from counterpoint.planner.batch import BatchPlan, Group, MicroBatch
from counterpoint.planner.batch_cost import BatchCost
from counterpoint.planner.batch_predict import check_fits
from counterpoint.planner.batch_solvers.static import finish

# Levels up to which ranks are filled, in mean times of a rank, and whether groups are powers of two, which leave no
# gaps beside each other. WIDER: how far a sequence may be spread to stay below the level.
LEVELS = ((1.04, False), (1.15, False), (1.04, True), (1.15, True))
WIDER = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0)
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
    check_fits(lengths, cost, cost.most_offload if options.offload else 0.0)
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    long = [i for i in order if lengths[i] > cost.capacity]
    short = [i for i in order if lengths[i] <= cost.capacity]
    needs = [need(i, lengths[i], cost, options.offload) for i in long]
    mean = float(cost.group((0,)).compute(lengths).sum()) / cost.ranks
    if options.balance == "none":
        needs = _widened(needs, lengths, cost, mean)
        return finish(lengths, cost, rows(_naive(needs, short, lengths, cost)), "bytescale")
    best, best_time = None, np.inf
    for level, powers in LEVELS if needs else LEVELS[:1]:
        work, times = _balanced(needs, short, lengths, cost, options, level * mean, powers)
        made = finish(lengths, cost, rows(work), "bytescale") if cost.synchronous else work
        took = made.seconds if isinstance(made, BatchPlan) else float(times.max())
        if took < best_time:
            best, best_time = made, took
        if not cost.synchronous and times.max() <= level * mean:
            break
    assert best is not None
    return best if isinstance(best, BatchPlan) else finish(lengths, cost, rows(best), "bytescale")


def _widened(needs: list[Need], lengths: Sequence[int], cost: BatchCost, mean: float) -> list[Need]:
    """Sequences on more ranks than memory asks for, where one would take longer than the mean rank (s)."""
    lone = cost.group((0,)).compute([lengths[n.sequence] for n in needs]).tolist()
    return [
        _on(n, nice(min(cost.ranks, max(n.ranks, ceil(seconds / mean))), cost), lengths, cost)
        for n, seconds in zip(needs, lone, strict=True)
    ]


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
    """Any number of ranks inside a node; beyond it, whole nodes."""
    node = cost.cluster.sizes[0]
    return ranks if ranks <= node else min(cost.ranks, ceil(ranks / node) * node)


def _size(ranks: int, cost: BatchCost, powers: bool) -> int:
    return min(cost.ranks, 1 << (ranks - 1).bit_length()) if powers else nice(ranks, cost)


def _naive(needs: list[Need], short: list[int], lengths: Sequence[int], cost: BatchCost) -> list[Group]:
    """Algorithm 1: long sequences and best-fit packs of short ones take the next free ranks in turn."""
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
    work, first = [], 0
    wanted = [(n.ranks, (n.sequence,), n.offload) for n in needs] + [
        (1, tuple(sorted(p)), 0.0) for p in packs
    ]
    for size, sequences, offload in wanted:
        start = _aligned(first, size, cost)
        if start + size > cost.ranks:
            start = 0
        work.append(Group(tuple(range(start, start + size)), sequences, offload))
        first = (start + size) % cost.ranks
    return work


def _balanced(
    needs: list[Need],
    short: list[int],
    lengths: Sequence[int],
    cost: BatchCost,
    options: BytescaleOptions,
    level: float,
    powers: bool,
) -> tuple[list[Group], np.ndarray]:
    """Algorithm 2: the longest first, always to the ranks with the least accumulated time, which comes with it.

    level: time (s) that no rank should exceed; a sequence is spread over as few ranks as keep it below (powers: over
    powers of two of them).
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
        ranks, until = (0,), np.inf
        for size in dict.fromkeys(_size(min(cost.ranks, ceil(n.ranks * w)), cost, powers) for w in WIDER):
            start = _least_loaded(times, size, cost)
            there = tuple(range(start, start + size))
            end = float(times[start : start + size].max())
            end += sum(cost.group(there).seconds([lengths[n.sequence]]))
            if end < until:
                ranks, until = there, end
            if end <= level:
                break
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
        for pack in _micro_batches(sequences, lengths, cost, options.balance):
            work.append(Group((rank,), tuple(sorted(pack))))
    return work, times


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


def _aligned(first: int, size: int, cost: BatchCost) -> int:
    """The next start from `first` on at which a group lies inside a node, or at a node's begin."""
    node = cost.cluster.sizes[0]
    if size <= node:
        return first if first % node + size <= node else ceil(first / node) * node
    return ceil(first / node) * node


def _least_loaded(times: np.ndarray, size: int, cost: BatchCost) -> int:
    """Where a group of neighbouring ranks can start the earliest; the first such place."""
    if size == 1:
        return int(times.argmin())
    node, last = cost.cluster.sizes[0], cost.ranks - size
    starts = np.arange(last + 1)
    starts = starts[starts % node + size <= node] if size <= node else starts[starts % node == 0]
    if not len(starts):
        starts = np.array([0])
    windows = np.lib.stride_tricks.sliding_window_view(times, size).max(axis=1)
    return int(starts[windows[starts].argmin()])


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
