"""One micro-batch: which sizes of groups, and which sequences in which group. Costs of every choice, and a fast answer.

The fast answer puts the longest sequence first, each where its group is done soonest, for compositions of groups that
a local search reaches by splitting and merging. It starts the MILP, and stands alone where time is short.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from counterpoint.planner.batch import Group, MicroBatch
from counterpoint.planner.batch_cost import BatchCost
from counterpoint.planner.batch_solvers.static import degrees

STARTS = 3  # compositions from which the search sets out
Composition = tuple[int, ...]  # sizes of the groups, largest first


@dataclass(frozen=True)
class Task:
    """A micro-batch to be planned: sequences (indices) with their lengths, longest first, and their costs by degree.

    costs[d]: (3, sequences) seconds that each adds to compute, exposed and travelling in a group of d ranks; fixed[d]:
    what these begin with. A group takes max(compute, state) + exposed + max(0, travelling); `state` seconds are needed
    to gather what is sharded.
    """

    sequences: tuple[int, ...]
    lengths: np.ndarray
    ranks: int
    capacity: int
    state: float
    costs: dict[int, np.ndarray]
    fixed: dict[int, np.ndarray]

    @classmethod
    def of(cls, sequences: Sequence[int], lengths: Sequence[int], cost: BatchCost) -> Task:
        order = sorted(sequences, key=lambda i: (-lengths[i], i))
        s = np.array([lengths[i] for i in order], dtype=np.int64)
        costs, fixed = {}, {}
        for d in degrees(cost.ranks):
            group = cost.group(range(d))
            costs[d] = np.stack([group.compute(s), group.exposed(s), group.travelling(s)])
            fixed[d] = np.array(group.fixed)
        state = cost.state_seconds if cost.synchronous else 0.0
        return cls(tuple(order), s, cost.ranks, cost.capacity, state, costs, fixed)

    def seconds(self, degree: int, members: Sequence[int]) -> float:
        """Time of a group of this degree with these members (places in the task)."""
        return float(self.time(self.fixed[degree] + self.costs[degree][:, list(members)].sum(axis=1)))

    def time(self, parts: np.ndarray) -> np.ndarray:
        """Seconds of (compute, exposed, travelling), (3, ...)."""
        return np.maximum(parts[0], self.state) + parts[1] + np.maximum(parts[2], 0.0)


@dataclass(frozen=True, slots=True)
class Assignment:
    """(degree, members) of every group that has any; seconds of the slowest."""

    groups: tuple[tuple[int, tuple[int, ...]], ...]
    seconds: float


def assign(task: Task, sizes: Composition) -> Assignment | None:
    """Longest first, each to the group that is then done soonest; None when a sequence finds no room."""
    degree = np.array(sizes)
    kinds = sorted(set(sizes))
    column = np.array([kinds.index(d) for d in sizes])
    parts = np.stack([task.fixed[d] for d in sizes], axis=1)
    room = degree * task.capacity
    adds = np.stack([task.costs[d] for d in kinds], axis=2)[:, :, column]  # (3, sequences, groups)
    members: list[list[int]] = [[] for _ in sizes]
    for k, length in enumerate(task.lengths.tolist()):
        new = parts + adds[:, k]
        time = task.time(new)
        time[room < length] = np.inf
        g = int(time.argmin())
        if time[g] == np.inf:
            return None
        parts[:, g] = new[:, g]
        room[g] -= length
        members[g].append(k)
    groups = tuple((d, tuple(m)) for d, m in zip(sizes, members, strict=True) if m)
    return Assignment(groups, max(task.seconds(d, m) for d, m in groups))


def search(task: Task, most_steps: int = 64) -> Assignment | None:
    """The best assignment over compositions reached by splitting and merging groups; None when nothing fits."""
    seen: dict[Composition, Assignment | None] = {}

    def at(sizes: Composition) -> float:
        if sizes not in seen:
            seen[sizes] = assign(task, sizes)
        found = seen[sizes]
        return found.seconds if found else np.inf

    n, possible = task.ranks, degrees(task.ranks)
    smallest = next(d for d in possible if d * task.capacity >= int(task.lengths[0]))
    starts: list[Composition] = [(d,) * (n // d) for d in possible]
    for d in (d for d in possible if d < smallest):  # the longest sequence alone, small groups around it
        starts.append((smallest,) + (d,) * ((n - smallest) // d))
    ends = []
    for current in sorted(set(starts), key=at)[:STARTS]:
        for _ in range(most_steps):
            best = min(_neighbours(current, n), key=at, default=current)
            if at(best) >= at(current) - 1e-12:
                break
            current = best
        ends.append(current)
    return seen[min(ends, key=at)]


def _neighbours(sizes: Composition, ranks: int) -> list[Composition]:
    """One group split in two, or two equal groups merged, or idle ranks used; one or two of a size at a time."""
    found: set[Composition] = set()
    count, idle = Counter(sizes), ranks - sum(sizes)
    for d in count:
        for times in {1, 2, 4} & set(range(1, count[d] + 1)):
            if d > 1 and d % 2 == 0:
                found.add(_changed(count, {d: -times, d // 2: 2 * times}))
            if count[d] >= 2 * times and 2 * d <= ranks:
                found.add(_changed(count, {d: -2 * times, 2 * d: times}))
    if idle:
        found.add(_changed(count, {1 << (idle.bit_length() - 1): 1}))
    return sorted(found)


def _changed(count: Counter[int], change: dict[int, int]) -> Composition:
    new = Counter(count)
    for d, by in change.items():
        new[d] += by
    return tuple(sorted(new.elements(), reverse=True))


def place(task: Task, assignment: Assignment) -> MicroBatch:
    """Groups on ranks, largest first, so that powers of two lie aligned."""
    groups, first = [], 0
    for degree, members in sorted(assignment.groups, key=lambda g: (-g[0], g[1])):
        sequences = tuple(sorted(task.sequences[k] for k in members))
        groups.append(Group(tuple(range(first, first + degree)), sequences))
        first += degree
    return MicroBatch(tuple(groups))
