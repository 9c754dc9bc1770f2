"""Which plan for a batch of these lengths? Every solver's plan is predicted alike, and the fastest wins."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from counterpoint.planner.batch import BatchPlan
from counterpoint.planner.batch_cost import BatchCost
from counterpoint.planner.batch_predict import Prediction, check_fits, predict
from counterpoint.planner.batch_solvers.bytescale import BytescaleOptions, bytescale
from counterpoint.planner.batch_solvers.dynamic_cp import dynamic_cp
from counterpoint.planner.batch_solvers.flexsp import FlexspOptions, flexsp
from counterpoint.planner.batch_solvers.static import adaptive, static

FLEXSP_MOST_RANKS = 256  # beyond, the search over compositions takes longer than a step


@dataclass(frozen=True, slots=True)
class BatchAnswer:
    """A solver's plan with its prediction; plan_seconds: how long the solver took. error: why there is no plan."""

    solver: str
    plan: BatchPlan | None
    prediction: Prediction | None
    plan_seconds: float = 0.0
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "solver": self.solver,
            "plan_seconds": self.plan_seconds,
            "error": self.error,
        }
        if self.plan is not None and self.prediction is not None:
            found |= {"micro_batches": len(self.plan.micro_batches), "groups": sizes(self.plan)}
            found |= {"prediction": self.prediction.to_json(), "plan": self.plan.to_json()}
        return found


Solve = Callable[[Sequence[int], BatchCost], BatchPlan]


def solvers(
    cost: BatchCost, *, context: int | None = None, options: FlexspOptions | None = None, workers: int = 1
) -> dict[str, Solve]:
    """Solvers by name, the fixed degree first. context: what it is made for, if more than the longest sequence."""
    found: dict[str, Solve] = {
        "static": lambda s, c: static(s, c, context=context),
        "adaptive": adaptive,
        "dynamic-cp": dynamic_cp,
        "flexsp": lambda s, c: flexsp(s, c, options, workers),
        "bytescale-naive": lambda s, c: bytescale(s, c, BytescaleOptions(offload=False, balance="none")),
        "bytescale-offload": lambda s, c: bytescale(s, c, BytescaleOptions(balance="none")),
        "bytescale": bytescale,
        "bytescale-pp": lambda s, c: bytescale(s, c, BytescaleOptions(balance="pp")),
    }
    if len(cost.cluster.device(0).memory) < 2:
        found.pop("bytescale-offload")
    return found


def plan_batch(
    lengths: Sequence[int],
    cost: BatchCost,
    chosen: dict[str, Solve] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[BatchAnswer]:
    """The answers of all solvers, the fastest first and those without a plan last.

    Raises ValueError for an empty batch, lengths below 1, or a sequence that no solver could place.
    """
    roomy = len(cost.cluster.device(0).memory) > 1
    check_fits(lengths, cost, 1.0 if roomy else 0.0)
    answers = []
    for name, solve in (chosen or solvers(cost)).items():
        if progress:
            progress(name)
        if name == "flexsp" and cost.ranks > FLEXSP_MOST_RANKS:
            why = f"searches up to {FLEXSP_MOST_RANKS} ranks, these are {cost.ranks}"
            answers.append(BatchAnswer(name, None, None, 0.0, why))
            continue
        begin = time.perf_counter()
        try:
            plan = replace(solve(lengths, cost), solver=name)
        except ValueError as error:
            answers.append(BatchAnswer(name, None, None, time.perf_counter() - begin, str(error)))
            continue
        took = time.perf_counter() - begin
        answers.append(BatchAnswer(name, plan, predict(plan, cost), took))
    if all(answer.plan is None for answer in answers):
        raise ValueError(answers[0].error)
    return sorted(answers, key=lambda a: a.prediction.seconds if a.prediction else float("inf"))


def sizes(plan: BatchPlan) -> dict[int, int]:
    """How many groups of each size the plan has, the largest first."""
    count = Counter(len(group.ranks) for row in plan.micro_batches for group in row.groups)
    return {size: count[size] for size in sorted(count, reverse=True)}


def reason(answers: Sequence[BatchAnswer]) -> str:
    """Why the first answer wins, against the fixed degree and the next solver."""
    best = answers[0]
    assert best.prediction is not None
    lines = [_compared(best, other) for other in answers[1:2] if other.prediction]
    lines += [_compared(best, a) for a in answers[2:] if a.solver == "static" and a.prediction]
    return "\n".join(lines) or f"{best.solver} is the only solver with a plan"


def _compared(best: BatchAnswer, other: BatchAnswer) -> str:
    a, b = best.prediction, other.prediction
    assert a is not None
    assert b is not None
    parts = [
        f"{name} {abs(y - x):,.3g} s {'less' if y > x else 'more'}"
        for name, x, y in (
            ("communication", a.communication, b.communication),
            ("idle", a.idle, b.idle),
            ("computing", a.compute, b.compute),
        )
        if abs(y - x) >= 0.001 * b.seconds
    ]
    faster = f"{best.solver} is {b.seconds / a.seconds:.2f} times as fast as {other.solver}"
    return faster + (f": per rank {', '.join(parts)}" if parts else ": they are equally good")
