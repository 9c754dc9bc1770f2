"""A mixed-integer linear program as rows and columns, solved with HiGHS (one thread) and written as MPS."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INFINITY = float("inf")


@dataclass(frozen=True, slots=True)
class Progress:
    """The best solution and the proven bound at a time (s); gap = (incumbent - bound) / |incumbent|."""

    seconds: float
    incumbent: float
    bound: float

    @property
    def gap(self) -> float:
        if abs(self.incumbent) == INFINITY or abs(self.bound) == INFINITY:
            return INFINITY
        return max(0.0, self.incumbent - self.bound) / max(abs(self.incumbent), 1e-12)


@dataclass(frozen=True, slots=True)
class MilpResult:
    """values: of the best solution, None when there is none. status: "optimal", "limit" or "infeasible"."""

    values: tuple[float, ...] | None
    objective: float
    bound: float
    status: str
    seconds: float
    nodes: int
    trajectory: tuple[Progress, ...] = ()

    @property
    def gap(self) -> float:
        return Progress(0.0, self.objective, self.bound).gap


@dataclass
class Milp:
    """Minimise `cost` x under row bounds. Columns and rows are added one by one and have names."""

    name: str
    names: list[str] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    rows: list[tuple[str, dict[int, float], float, float]] = field(default_factory=list)

    def variable(
        self,
        name: str,
        lower: float = 0.0,
        upper: float = INFINITY,
        *,
        integer: bool = False,
        cost: float = 0.0,
    ) -> int:
        """The number of a new column."""
        self.names.append(name)
        self.lower.append(lower)
        self.upper.append(upper)
        self.integer.append(integer)
        self.cost.append(cost)
        return len(self.names) - 1

    def row(
        self, name: str, terms: Mapping[int, float], lower: float = -INFINITY, upper: float = INFINITY
    ) -> None:
        """lower <= sum of coefficient times column <= upper."""
        self.rows.append((name, {c: v for c, v in terms.items() if v}, lower, upper))

    def solve(
        self,
        *,
        seconds: float = INFINITY,
        checks: int | None = None,
        gap: float = 1e-6,
        start: Sequence[float] | None = None,
        seed: int = 0,
    ) -> MilpResult:
        """Solve with HiGHS. `start` is a feasible solution to begin with.

        checks: after how many of HiGHS' questions whether to go on the answer is no: the same place every time.
        seconds is not, and HiGHS does not look at its clock in every step of presolve, so a caller that must return
        runs this in a process that it can end (`planner.workers`).
        """
        import highspy

        h = self._highs(highspy)
        for option, value in (
            ("time_limit", seconds),
            ("mip_rel_gap", gap),
            ("random_seed", seed),
        ):
            h.setOptionValue(option, value)
        if start is not None:
            solution = highspy.HighsSolution()
            solution.col_value = list(start)
            h.setSolution(solution)
        seen: list[Progress] = []

        def note(event: Any) -> None:
            out = event.data_out
            found = Progress(out.running_time, out.mip_primal_bound, out.mip_dual_bound)
            if not seen or (found.incumbent, found.bound) != (seen[-1].incumbent, seen[-1].bound):
                seen.append(found)

        asked = 0

        def go_on(event: Any) -> None:
            nonlocal asked
            asked += 1
            if checks is not None and asked > checks:
                event.data_in.user_interrupt = True

        h.cbMipInterrupt += go_on
        h.cbMipImprovingSolution += note
        h.cbMipLogging += note
        h.run()
        return self._result(h, highspy, seen)

    def _result(self, h: Any, highspy: Any, seen: list[Progress]) -> MilpResult:
        info, status = h.getInfo(), h.getModelStatus()
        kinds = highspy.HighsModelStatus
        took, count = h.getRunTime(), int(info.mip_node_count)
        if status in (kinds.kInfeasible, kinds.kUnboundedOrInfeasible):
            return MilpResult(None, INFINITY, INFINITY, "infeasible", took, count)
        has = info.primal_solution_status == highspy.kSolutionStatusFeasible
        values = tuple(h.getSolution().col_value) if has else None
        objective = info.objective_function_value if has else INFINITY
        bound = info.mip_dual_bound if any(self.integer) else objective
        done = "optimal" if status == kinds.kOptimal else "limit"
        last = Progress(took, objective, bound)
        return MilpResult(values, objective, bound, done, took, count, (*_falling(seen), last))

    def write_mps(self, path: str | Path) -> None:
        """The program as an MPS file."""
        import highspy

        h = self._highs(highspy)
        if h.writeModel(str(path)) == highspy.HighsStatus.kError:
            raise ValueError(f"{path}: HiGHS could not write the model")

    def _highs(self, highspy: Any) -> Any:
        import numpy as np

        h = _highs(highspy)
        lp = highspy.HighsLp()
        lp.model_name_ = self.name
        lp.num_col_, lp.num_row_ = len(self.names), len(self.rows)
        lp.col_cost_ = np.array(self.cost)
        lp.col_lower_, lp.col_upper_ = np.array(self.lower), np.array(self.upper)
        lp.row_lower_ = np.array([row[2] for row in self.rows])
        lp.row_upper_ = np.array([row[3] for row in self.rows])
        lp.col_names_, lp.row_names_ = self.names, [row[0] for row in self.rows]
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.cumsum([0, *(len(row[1]) for row in self.rows)])
        lp.a_matrix_.index_ = np.array([c for row in self.rows for c in row[1]], dtype=np.int32)
        lp.a_matrix_.value_ = np.array([v for row in self.rows for v in row[1].values()])
        kinds = highspy.HighsVarType
        lp.integrality_ = [kinds.kInteger if i else kinds.kContinuous for i in self.integer]
        if h.passModel(lp) == highspy.HighsStatus.kError:
            raise ValueError(f"HiGHS does not take the program {self.name}")
        return h


def read_mps(path: str | Path, **options: Any) -> MilpResult:
    """Solve a program from an MPS file, to check what was stored with it."""
    import highspy

    h = _highs(highspy)
    for option, value in options.items():
        h.setOptionValue(option, value)
    if h.readModel(str(path)) == highspy.HighsStatus.kError:
        raise ValueError(f"{path}: not an MPS file that HiGHS reads")
    h.run()
    model = Milp("")
    model.integer = [kind != highspy.HighsVarType.kContinuous for kind in h.getLp().integrality_]
    return model._result(h, highspy, [])


def _highs(highspy: Any) -> Any:
    """A solver that says nothing and uses one thread. HiGHS greets on standard output when it is made."""
    sys.stdout.flush()
    kept, void = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(void, 1)
        h = highspy.Highs()
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(void)
    h.setOptionValue("output_flag", False)
    h.setOptionValue("threads", 1)
    return h


def _falling(seen: list[Progress]) -> list[Progress]:
    """Progress with incumbents that only fall and bounds that only rise."""
    kept: list[Progress] = []
    best, bound = INFINITY, -INFINITY
    for p in seen:
        best, bound = min(best, p.incumbent), max(bound, p.bound)
        kept.append(Progress(p.seconds, best, bound))
    return kept
