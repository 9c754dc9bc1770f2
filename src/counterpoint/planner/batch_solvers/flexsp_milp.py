"""FlexSP's planner MILP (arXiv 2412.01523, section 4.1): virtual groups of every power of two, bucketed sequences.

m_p: group p is used. A_qp: how many sequences of bucket q it gets. Minimise C subject to time_p <= C and memory for
every p, sum_p d_p m_p <= N, sum_q A_qp <= K m_p, sum_p A_qp = size of bucket q.

Added without loss of solutions: sum_p d_p time_p <= N C, as no more than N ranks work at a time (virtual groups have
several times as many, over which the relaxation would spread everything); and of equal groups the first ones are used
and get the most of the longest sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from counterpoint.planner.batch_cost import BatchCost
from counterpoint.planner.batch_solvers.assignment import Assignment, Task
from counterpoint.planner.batch_solvers.buckets import Bucket, optimal_buckets
from counterpoint.planner.batch_solvers.static import degrees
from counterpoint.planner.milp import Milp


class MicroBatchMilp:
    """The program of one micro-batch, a way in for a starting solution and a way out to an assignment."""

    def __init__(self, task: Task, cost: BatchCost, buckets: int = 16) -> None:
        self.task = task
        self.buckets: list[Bucket] = optimal_buckets(task.lengths.tolist(), buckets)
        bounds = Task.of(range(len(self.buckets)), [b.bound for b in self.buckets], cost)
        self.buckets = [self.buckets[q] for q in bounds.sequences]  # longest first, as the task has them
        self.bounds = bounds
        n, most = task.ranks, len(task.sequences)
        self.sizes = [d for d in sorted(degrees(n), reverse=True) for _ in range(min(n // d, most))]
        self.program = self._program()

    def _program(self) -> Milp:
        task, bounds, program = self.task, self.bounds, Milp("flexsp")
        state = task.state
        self.slowest = program.variable("C", state, cost=1.0)
        self.used: list[int] = []
        self.given: list[list[int]] = []
        counts = [len(b.sequences) for b in self.buckets]
        for p, d in enumerate(self.sizes):
            self.used.append(program.variable(f"m{p}", 0, 1, integer=True))
            row = []
            for q, count in enumerate(counts):
                most = min(count, d * task.capacity // int(bounds.lengths[q]))
                row.append(program.variable(f"A{q}_{p}", 0, most, integer=True))
            self.given.append(row)
        area: dict[str, dict[int, float]] = {}  # rank-seconds of all groups together
        for p, d in enumerate(self.sizes):
            m, row = self.used[p], self.given[p]
            compute, exposed, travelling = (
                {**dict(zip(row, part.tolist(), strict=True)), m: fixed}
                for part, fixed in zip(bounds.costs[d], bounds.fixed[d].tolist(), strict=True)
            )
            # max(compute, state) + exposed + max(0, travelling), as the largest of up to four sums
            first = [("time", compute)] + ([("state", {m: state})] if state else [])
            then = [exposed]
            if any(travelling.values()):
                then.append({a: exposed[a] + travelling[a] for a in exposed})
            for name, one in first:
                for number, other in enumerate(then):
                    terms = {a: one.get(a, 0.0) + other[a] for a in other}
                    program.row(f"{name}{number or ''}_{p}", {**terms, self.slowest: -1.0}, upper=0.0)
                    whole = area.setdefault(f"{name}{number or ''}", {})
                    whole.update({a: d * seconds for a, seconds in terms.items()})
            tokens = {a: float(s) for a, s in zip(row, bounds.lengths, strict=True)}
            program.row(f"memory{p}", {**tokens, m: -float(d * task.capacity)}, upper=0.0)
            program.row(f"member{p}", {**dict.fromkeys(row, 1.0), m: -float(sum(counts))}, upper=0.0)
            if p and self.sizes[p - 1] == d:  # groups of one size are alike: use the first ones
                program.row(f"order{p}", {self.used[p - 1]: 1.0, m: -1.0}, lower=0.0)
                program.row(f"longest{p}", {self.given[p - 1][0]: 1.0, row[0]: -1.0}, lower=0.0)
        for name, terms in area.items():
            program.row(f"area_{name}", {**terms, self.slowest: -float(task.ranks)}, upper=0.0)
        program.row("ranks", {m: float(d) for m, d in zip(self.used, self.sizes)}, upper=float(task.ranks))
        for q, count in enumerate(counts):
            program.row(f"bucket{q}", {row[q]: 1.0 for row in self.given}, count, count)
        return program

    def start(self, assignment: Assignment) -> list[float] | None:
        """The program's variables for an assignment; None when bucket bounds make it too large for a group."""
        values = [0.0] * len(self.program.names)
        bucket_of = {k: q for q, b in enumerate(self.buckets) for k in b.sequences}
        free: dict[int, list[int]] = {}
        for p, d in enumerate(self.sizes):
            free.setdefault(d, []).append(p)
        slowest = self.task.state

        def longest(group: tuple[int, tuple[int, ...]]) -> int:
            return sum(bucket_of[k] == 0 for k in group[1])

        for d, members in sorted(assignment.groups, key=longest, reverse=True):
            p = free[d].pop(0)
            values[self.used[p]] = 1.0
            counts = np.zeros(len(self.buckets), dtype=np.int64)
            for k in members:
                counts[bucket_of[k]] += 1
            if (counts * self.bounds.lengths).sum() > d * self.task.capacity:
                return None
            for q, count in enumerate(counts.tolist()):
                values[self.given[p][q]] = float(count)
            parts = self.bounds.fixed[d] + (counts * self.bounds.costs[d]).sum(axis=1)
            slowest = max(slowest, float(self.task.time(parts)))
        values[self.slowest] = slowest
        return values

    def assignment(self, values: Sequence[float]) -> Assignment:
        """The groups of a solution, with the sequences themselves in place of their buckets."""
        left = [list(b.sequences) for b in self.buckets]
        groups = []
        for p, d in enumerate(self.sizes):
            members: list[int] = []
            for q, column in enumerate(self.given[p]):
                for _ in range(round(values[column])):
                    members.append(left[q].pop(0))
            if members:
                groups.append((d, tuple(sorted(members))))
        assert not any(left), "every sequence has a group"
        return Assignment(tuple(groups), max(self.task.seconds(d, m) for d, m in groups))
