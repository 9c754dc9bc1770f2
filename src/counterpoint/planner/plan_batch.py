"""Which plan for a batch of these lengths, and which strategy for every type of layers?

Every solver plans with every strategy of the softmax layers; each plan is predicted with every strategy of the linear
layers, whose messages no sequence makes larger. All predictions are alike, and the fastest wins.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from counterpoint.planner.attention import TIE
from counterpoint.planner.batch import BatchPlan
from counterpoint.planner.batch_cost import BatchCost
from counterpoint.planner.batch_predict import Prediction, check_fits, predict
from counterpoint.planner.batch_probe import GroupStrategy
from counterpoint.planner.batch_solvers.bytescale import BytescaleOptions, bytescale
from counterpoint.planner.batch_solvers.dynamic_cp import dynamic_cp
from counterpoint.planner.batch_solvers.flexsp import FlexspOptions, flexsp
from counterpoint.planner.batch_solvers.static import adaptive, static
from counterpoint.planner.group_cost import MOVES
from counterpoint.planner.layer_work import layer_kinds

FLEXSP_MOST_RANKS = 256  # beyond, the search over compositions takes longer than a step


@dataclass(frozen=True, slots=True)
class BatchAnswer:
    """A solver's plan with its prediction.

    strategies: by type of layers. plan_seconds: how long the solver took. error: why there is no plan.
    """

    solver: str
    strategies: dict[str, str]
    plan: BatchPlan | None
    prediction: Prediction | None
    plan_seconds: float = 0.0
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.solver} with {', '.join(dict.fromkeys(self.strategies.values()))}"

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "solver": self.solver,
            "strategies": self.strategies,
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
    if not cost.offloads:
        found.pop("bytescale-offload")
    return found


def batch_costs(
    cost: BatchCost, softmax: Sequence[GroupStrategy], linear: Sequence[str]
) -> list[list[BatchCost]]:
    """A cost for every strategy of the softmax layers, and of each those for every strategy of the linear ones."""
    kinds = {kind.type == "linear_attention" for kind in layer_kinds(cost.model)}
    softmax = softmax if False in kinds else softmax[:1]
    found = []
    for strategy in softmax:
        first = cost.with_strategies(strategy, linear[0])
        found.append([first] + [first.with_strategies(strategy, s) for s in linear[1:] if True in kinds])
    return found


def plan_batch(
    lengths: Sequence[int],
    costs: Sequence[Sequence[BatchCost]],
    chosen: dict[str, Solve] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[BatchAnswer]:
    """The answers of all solvers with all strategies, the fastest first and those without a plan last.

    costs: as from `batch_costs`; a solver plans with the first of a row. Of answers within a percent of the fastest
    and of the same solver, the one whose strategies come first in `costs` is the first. Raises ValueError for an empty
    batch, lengths below 1, or a sequence that no solver could place.
    """
    found: list[BatchAnswer] = []
    for variants in costs:
        cost = variants[0]
        check_fits(lengths, cost, cost.most_offload)
        for name, solve in (chosen or solvers(cost)).items():
            if progress:
                progress(f"{name}, {cost.strategy}")
            found += _answers(name, solve, lengths, variants)
    planned = sorted((a for a in found if a.prediction), key=_seconds)
    if not planned:
        raise ValueError(found[0].error)
    order = {tuple(cost.strategies.items()): i for i, cost in enumerate(c for row in costs for c in row)}
    close = [
        a for a in planned if a.solver == planned[0].solver and _seconds(a) <= TIE * _seconds(planned[0])
    ]
    first = min(close, key=lambda a: order[tuple(a.strategies.items())])
    return [first, *(a for a in planned if a is not first), *(a for a in found if not a.prediction)]


def _answers(
    name: str, solve: Solve, lengths: Sequence[int], variants: Sequence[BatchCost]
) -> list[BatchAnswer]:
    """A solver's plan, predicted with every cost; or why there is none."""
    cost = variants[0]
    if name == "flexsp" and cost.ranks > FLEXSP_MOST_RANKS:
        why = f"searches up to {FLEXSP_MOST_RANKS} ranks, these are {cost.ranks}"
        return [BatchAnswer(name, cost.strategies, None, None, 0.0, why)]
    begin = time.perf_counter()
    try:
        plan = replace(solve(lengths, cost), solver=name)
    except ValueError as error:
        return [BatchAnswer(name, cost.strategies, None, None, time.perf_counter() - begin, str(error))]
    took = time.perf_counter() - begin
    found = []
    for variant in variants:
        prediction = predict(plan, variant)
        found.append(
            BatchAnswer(name, variant.strategies, replace(plan, seconds=prediction.seconds), prediction, took)
        )
    return found


def _seconds(answer: BatchAnswer) -> float:
    assert answer.prediction is not None
    return answer.prediction.seconds


def sizes(plan: BatchPlan) -> dict[int, int]:
    """How many groups of each size the plan has, the largest first."""
    count = Counter(len(group.ranks) for row in plan.micro_batches for group in row.groups)
    return {size: count[size] for size in sorted(count, reverse=True)}


def reason(answers: Sequence[BatchAnswer]) -> str:
    """Why the first answer wins: against other solvers, and type by type against other strategies of its solver."""
    best, others = answers[0], [a for a in answers[1:] if a.prediction]
    rival = next((a for a in others if a.solver != best.solver), None)
    fixed = next((a for a in others if a.solver == "static"), None)
    lines = [_compared(best, a) for a in (rival, fixed if fixed is not rival else None) if a is not None]
    for kind, strategy in best.strategies.items():
        known = (a for a in others if a.solver == best.solver and a.strategies[kind] != strategy)
        other = next(known, None)
        if other is not None:
            lines.append(f"{kind}: {_taken(best, kind)}; {_taken(other, kind)}")
    return "\n".join(lines) or f"{best.name} is the only answer"


def _taken(answer: BatchAnswer, kind: str) -> str:
    assert answer.prediction is not None
    share = next(s for s in answer.prediction.shares if s.name == kind)
    more = [s for s in answer.prediction.shares if s.name == MOVES and s.communication]
    moved = f" (and {more[0].communication:.3g} s of changes of layout)" if more else ""
    return (
        f"with {answer.strategies[kind]} {share.compute:.3g} s of computing, {share.communication:.3g} s of exposed "
        f"messages{moved} and {share.sent_bytes / 1e6:,.1f} MB sent a rank"
    )


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
    faster = f"{best.name} is {b.seconds / a.seconds:.2f} times as fast as {other.name}"
    return faster + (f": per rank {', '.join(parts)}" if parts else ": they are equally good")
