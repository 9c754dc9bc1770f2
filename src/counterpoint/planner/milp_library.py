"""MILP instances of the planner with what is known of them: the seed of a library of distributions.

An instance is a .mps file and a .json file beside it: family, parameters, seed, best known objective with solution,
the trajectory of incumbent, bound and gap, a hardness label, and the licence. Hardness has the classes of
Distributional MIPLIB (arXiv 2406.06954) with its thresholds of time divided by SCALE: an hour becomes 3.6 s.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from counterpoint.planner.batch_cost import BatchCost
from counterpoint.planner.batch_predict import check_fits
from counterpoint.planner.batch_solvers.flexsp import FlexspOptions, plan_pieces
from counterpoint.planner.batch_solvers.flexsp_milp import MicroBatchMilp
from counterpoint.planner.milp import MilpResult, Progress, read_mps

SCALE = 1000.0
LIMIT_SECONDS = 3600.0 / SCALE
GAP_BOUNDARY = 0.1
Hardness = Literal["easy", "medium", "hard", "very hard", "extremely hard"]


def hardness(result: MilpResult) -> Hardness:
    """By the time it took, times SCALE: below 100 s, 1,000 s, or longer; by the gap when the limit came."""
    if result.status != "limit":
        seconds = SCALE * result.seconds
        return "easy" if seconds < 100 else "medium" if seconds < 1000 else "hard"
    return "very hard" if result.gap <= GAP_BOUNDARY else "extremely hard"


def primal_dual_integral(trajectory: Sequence[Progress]) -> float:
    """Sum of time between entries times the gap in between; a gap without solution or bound counts as 1."""
    total, before, gap = 0.0, 0.0, 1.0
    for entry in trajectory:
        total += (entry.seconds - before) * gap
        before, gap = entry.seconds, min(1.0, entry.gap)
    return total


def export_flexsp(
    lengths: Sequence[int], cost: BatchCost, options: FlexspOptions, folder: str | Path
) -> list[Path]:
    """The MILPs of the best number of micro-batches, solved within the limit, as files; the MPS files' paths."""
    check_fits(lengths, cost)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pieces = -(-sum(lengths) // (cost.ranks * cost.capacity))
    planned = None
    while planned is None:
        planned = plan_pieces(lengths, cost, pieces)
        pieces += 1
    written = []
    for number, (task, assignment) in enumerate(planned):
        model = MicroBatchMilp(task, cost, options.buckets)
        result = model.program.solve(
            seconds=LIMIT_SECONDS, start=model.start(assignment), seed=options.seed, gap=1e-6
        )
        parameters = {
            "model_layers": cost.model.num_hidden_layers,
            "model_hidden": cost.model.hidden_size,
            "cluster": cost.cluster.name,
            "ranks": cost.ranks,
            "tokens_per_rank": cost.capacity,
            "buckets": options.buckets,
            "lengths": task.lengths.tolist(),
        }
        path = folder / f"flexsp-{cost.cluster.name}-{cost.ranks}-seed{options.seed}-{number:03d}.mps"
        model.program.write_mps(path)
        path.with_suffix(".json").write_text(
            json.dumps(metadata("flexsp", parameters, options.seed, path, model, result), indent=1)
        )
        written.append(path)
    return written


def metadata(
    family: str, parameters: dict[str, Any], seed: int, path: Path, model: MicroBatchMilp, result: MilpResult
) -> dict[str, Any]:
    program = model.program
    rows = [{**asdict(p), "gap": p.gap} for p in result.trajectory]
    values = dict(zip(program.names, result.values, strict=True)) if result.values else {}
    return {
        "family": family,
        "parameters": parameters,
        "seed": seed,
        "file": path.name,
        "columns": len(program.names),
        "integers": sum(program.integer),
        "rows": len(program.rows),
        "status": result.status,
        "best_known_objective": _finite(result.objective),
        "bound": _finite(result.bound),
        "gap": _finite(result.gap),
        "solution": {name: value for name, value in values.items() if value},
        "seconds": result.seconds,
        "nodes": result.nodes,
        "trajectory": [{key: _finite(value) for key, value in row.items()} for row in rows],
        "primal_dual_integral": primal_dual_integral(result.trajectory),
        "hardness": hardness(result),
        "hardness_scale": SCALE,
        "solver": "HiGHS, one thread",
        "licence": "Apache-2.0 (made by Counterpoint's planner)",
    }


def check_instance(path: str | Path) -> tuple[float, float]:
    """(stored objective, that of the instance solved again to optimality). Raises ValueError for one without."""
    path = Path(path)
    stored = json.loads(path.with_suffix(".json").read_text())
    if stored["status"] != "optimal":
        raise ValueError(f"{path}: was not solved to optimality, its best known value is no optimum")
    return stored["best_known_objective"], read_mps(path).objective


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if abs(value) != float("inf") else None
