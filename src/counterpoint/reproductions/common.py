"""Checks that every exact strategy shares."""

from __future__ import annotations

from collections.abc import Sequence

from counterpoint.reproductions.bench import Bench, Case, Pass, sent
from counterpoint.reproductions.check import EXACTLY, Check, Tolerance

FLOAT32 = Tolerance(absolute=2e-5, side="at most")


def exactness_checks(cases: Sequence[Case], source: str) -> list[Check]:
    """On real processes: out, dq, dk, dv equal one process, and as many bytes travel as the schedules say."""
    checks = [
        Check(
            f"{name_of(case)}: out, dq, dk, dv against one process", 0.0, "", source, "exact", FLOAT32,
            lambda bench, case=case: bench.outcome(case, cases).difference,
        )
        for case in cases
    ]  # fmt: skip
    largest = max(cases, key=lambda case: (case.ranks, case.causal, case.heads // case.kv_heads))

    def counted(bench: Bench, way: Pass) -> float:
        outcome = bench.outcome(largest, cases)
        nbytes = outcome.forward_bytes if way == "forward" else outcome.backward_bytes
        return nbytes / sum(sent(largest.schedules(way)))

    ways: tuple[Pass, ...] = ("forward", "backward")
    checks += [
        Check(
            f"{name_of(largest)}: bytes they counted over those of the schedules, {way}", 1.0, "x", "conformance",
            "measured", EXACTLY, lambda bench, way=way: counted(bench, way),
        )
        for way in ways
    ]  # fmt: skip
    return checks


def name_of(case: Case) -> str:
    mask = "causal" if case.causal else "no mask"
    return f"{case.ranks} processes, {case.heads} heads over {case.kv_heads}, {case.layout}, {mask}"
