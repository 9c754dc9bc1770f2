"""A size of context parallelism per sequence, as Megatron-Core's dynamic (hybrid) context parallelism has it.

A heuristic in its manner (hybrid_cp_schedule, pull requests 2054 and 2282): workload s^2 / cp; groups of powers of
two as small as memory allows; sequences are added to a micro-batch while its groups stay within a slack of 5 % of each
other; ranks left over go to the groups with the most work.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from counterpoint.planner.batch import BatchPlan, Group, MicroBatch
from counterpoint.planner.batch_cost import BatchCost
from counterpoint.planner.batch_predict import check_fits
from counterpoint.planner.batch_solvers.static import degrees, finish

SLACK = 0.05


@dataclass
class Block:
    """Ranks `start` to `start + size` with their sequences, tokens, and workload sum s^2 / size."""

    start: int
    size: int
    sequences: list[int] = field(default_factory=list)
    tokens: int = 0
    squares: float = 0.0

    @property
    def workload(self) -> float:
        return self.squares / self.size

    def add(self, sequence: int, length: int) -> None:
        self.sequences.append(sequence)
        self.tokens += length
        self.squares += float(length) ** 2


def dynamic_cp(lengths: Sequence[int], cost: BatchCost) -> BatchPlan:
    """The heuristic's plan. Raises ValueError when a sequence does not fit all ranks together."""
    check_fits(lengths, cost)
    sizes = degrees(cost.ranks)
    left = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    size_of = {i: next(d for d in sizes if d * cost.capacity >= lengths[i]) for i in left}
    plan = []
    while left:
        blocks, left = _micro_batch(left, size_of, lengths, cost)
        _use_idle(blocks, cost.ranks)
        groups = (
            Group(tuple(range(b.start, b.start + b.size)), tuple(sorted(b.sequences)))
            for b in sorted(blocks, key=lambda b: b.start)
        )
        plan.append(MicroBatch(tuple(groups)))
    return finish(lengths, cost, plan, "dynamic-cp")


def _micro_batch(
    left: list[int], size_of: dict[int, int], lengths: Sequence[int], cost: BatchCost
) -> tuple[list[Block], list[int]]:
    """Blocks of one micro-batch, and the sequences that stay for the next ones."""
    blocks: list[Block] = []
    by_size: dict[int, list[tuple[float, int, Block]]] = {}  # heaps: the least workload first
    stay, first, most = [], 0, 0.0
    for i in left:
        size, length = size_of[i], lengths[i]
        start = -(-first // size) * size
        heap = by_size.setdefault(size, [])
        if start + size <= cost.ranks:
            block = Block(start, size)
            blocks.append(block)
            first = start + size
        else:
            while heap and heap[0][2].tokens + length > size * cost.capacity:
                heapq.heappop(heap)  # full
            if not heap or heap[0][0] + float(length) ** 2 / size > (1 + SLACK) * most:
                stay.append(i)
                continue
            block = heapq.heappop(heap)[2]
        block.add(i, length)
        most = max(most, block.workload)
        heapq.heappush(heap, (block.workload, block.start, block))
    return blocks, stay


def _use_idle(blocks: list[Block], ranks: int) -> None:
    """Double the groups with the most workload while the ranks behind all groups last; the others move up."""
    idle = ranks - max(b.start + b.size for b in blocks)
    for block in sorted(blocks, key=lambda b: (-b.workload, b.start)):
        if block.size <= idle and block.size & (block.size - 1) == 0:
            idle -= block.size
            block.size *= 2
    first = 0
    for block in sorted(blocks, key=lambda b: (-b.size, b.start)):
        block.start, first = first, first + block.size
