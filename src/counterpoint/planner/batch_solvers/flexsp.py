"""FlexSP: per batch and micro-batch, groups of different sizes for sequences of different lengths (arXiv 2412.01523).

For every number of micro-batches M from the least that can hold all tokens, up to `tries` of them: sort by length, cut
into M pieces of about equal tokens, plan each piece (search, then the MILP from what it found), sum the times. The M
with the least time wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from counterpoint.planner.batch import BatchPlan
from counterpoint.planner.batch_cost import BatchCost
from counterpoint.planner.batch_predict import check_fits
from counterpoint.planner.batch_solvers.assignment import Assignment, Task, place, search
from counterpoint.planner.batch_solvers.buckets import cut_evenly
from counterpoint.planner.batch_solvers.flexsp_milp import MicroBatchMilp
from counterpoint.planner.batch_solvers.static import finish


@dataclass(frozen=True, slots=True)
class FlexspOptions:
    """tries: how many numbers of micro-batches. buckets: lengths that the MILP tells apart. nodes: of the MILP's tree
    a micro-batch; 0 leaves it out. milp_seconds: a limit beside it, for slow machines. gap: relative, where the MILP
    may stop."""

    tries: int = 5
    buckets: int = 16
    nodes: int = 200
    milp_seconds: float = 2.0
    gap: float = 0.01
    seed: int = 0


def flexsp(lengths: Sequence[int], cost: BatchCost, options: FlexspOptions | None = None) -> BatchPlan:
    """The fastest plan found. Raises ValueError when a sequence does not fit all ranks together."""
    options = options or FlexspOptions()
    check_fits(lengths, cost)
    found: list[tuple[float, list[tuple[Task, Assignment]]]] = []
    pieces = -(-sum(lengths) // (cost.ranks * cost.capacity))
    while len(found) < options.tries and pieces <= len(lengths):
        planned = _plan(lengths, cost, pieces)
        if planned is not None:
            found.append((sum(a.seconds for _, a in planned), planned))
        pieces += 1
    _, best = min(found, key=lambda f: f[0])
    plan = [place(task, improve(task, assignment, cost, options)) for task, assignment in best]
    return finish(lengths, cost, plan, "flexsp")


def _plan(lengths: Sequence[int], cost: BatchCost, pieces: int) -> list[tuple[Task, Assignment]] | None:
    planned = []
    for piece in cut_evenly(lengths, pieces):
        task = Task.of(piece, lengths, cost)
        assignment = search(task)
        if assignment is None:
            return None
        planned.append((task, assignment))
    return planned


def improve(task: Task, assignment: Assignment, cost: BatchCost, options: FlexspOptions) -> Assignment:
    """What the MILP makes of an assignment; the assignment itself when that is no better."""
    if not options.nodes or len(task.sequences) == 1:
        return assignment
    model = MicroBatchMilp(task, cost, options.buckets)
    result = model.program.solve(
        seconds=options.milp_seconds,
        nodes=options.nodes,
        gap=options.gap,
        start=model.start(assignment),
        seed=options.seed,
    )
    if result.values is None:
        return assignment
    return min(assignment, model.assignment(result.values), key=lambda a: a.seconds)
