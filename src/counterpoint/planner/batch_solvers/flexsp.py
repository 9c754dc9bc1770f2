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
from counterpoint.planner.workers import run_all


@dataclass(frozen=True, slots=True)
class FlexspOptions:
    """How long to look for a plan; plans depend on nothing else, unless a limit in seconds is reached.

    tries: how many numbers of micro-batches. buckets: lengths that the MILP tells apart. effort: how often HiGHS asks
    whether to go on before a micro-batch's MILP is stopped; 0 leaves it out. milp_sequences: micro-batches of more
    keep the search's answer, because rounding to buckets would cost more than the MILP gains. milp_seconds: a limit
    beside effort. gap: relative, where the MILP may stop.
    """

    tries: int = 5
    buckets: int = 16
    effort: int = 100
    milp_sequences: int = 48
    milp_seconds: float = 5.0
    gap: float = 0.005
    seed: int = 0


def flexsp(
    lengths: Sequence[int], cost: BatchCost, options: FlexspOptions | None = None, workers: int = 0
) -> BatchPlan:
    """The fastest plan found. Raises ValueError when a sequence does not fit all ranks together.

    workers: processes that solve the MILPs, each ended when it outlasts its limit by far; 0: in this process.
    """
    options = options or FlexspOptions()
    check_fits(lengths, cost)
    found: list[tuple[float, list[tuple[Task, Assignment]]]] = []
    pieces = -(-sum(lengths) // (cost.ranks * cost.capacity))
    while len(found) < options.tries and pieces <= len(lengths):
        planned = plan_pieces(lengths, cost, pieces)
        if planned is not None:
            found.append((sum(a.seconds for _, a in planned), planned))
        pieces += 1
    _, best = min(found, key=lambda f: f[0])
    hard = [k for k, (task, _) in enumerate(best) if 1 < len(task.sequences) <= options.milp_sequences]
    if options.effort and hard:
        jobs = [(improve, (*best[k], cost, options)) for k in hard]
        if workers:
            results = run_all(jobs, workers, 2 * options.milp_seconds + 20)
        else:
            results = [(function(*arguments), None) for function, arguments in jobs]
        for k, (assignment, error) in zip(hard, results, strict=True):
            if error is None:
                best[k] = best[k][0], assignment
    return finish(lengths, cost, [place(task, assignment) for task, assignment in best], "flexsp")


def plan_pieces(lengths: Sequence[int], cost: BatchCost, pieces: int) -> list[tuple[Task, Assignment]] | None:
    """The search's answer for every micro-batch when the batch is cut into this many; None when one does not fit."""
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
    model = MicroBatchMilp(task, cost, options.buckets)
    result = model.program.solve(
        seconds=options.milp_seconds,
        checks=options.effort,
        gap=options.gap,
        start=model.start(assignment),
        seed=options.seed,
    )
    if result.values is None:
        return assignment
    return min(assignment, model.assignment(result.values), key=lambda a: a.seconds)
