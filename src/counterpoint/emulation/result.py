"""What a run on a scale model measured, beside what was simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Literal

from counterpoint.cluster.cluster import Cluster
from counterpoint.emulation.published import published
from counterpoint.emulation.scale import Problem, Scale, strategies
from counterpoint.emulation.worker import Pass
from counterpoint.schedule.schedule import Compute, Schedule
from counterpoint.schedule.table import span_name
from counterpoint.schedule.timeline import Timeline

How = Literal["timed", "real"]
LATE = 0.05  # of a pass: kernels that end so late show that other programs keep the machine busy


@dataclass(frozen=True, slots=True)
class PassResult:
    """One pass: what was measured on the scale model (all repetitions, s), and what was simulated (s).

    late: for every repetition, by how much a rank's kernels together took longer than they were to be held, as a share
    of the pass; what other programs on this machine do to a run. real: simulated on the cluster. steps: times between
    the starts of a rank's attention kernels. timelines: of the repetition in the middle, and of the two simulations.
    """

    which: Pass
    measured: tuple[float, ...]
    late: tuple[float, ...]
    simulated: float
    real: float
    sent_bytes: int
    sent_bytes_expected: int
    measured_steps: tuple[float, ...]
    simulated_steps: tuple[float, ...]
    real_steps: tuple[float, ...]
    measured_timeline: Timeline
    simulated_timeline: Timeline
    real_timeline: Timeline

    @property
    def seconds(self) -> float:
        return median(self.measured)

    @property
    def error(self) -> float:
        """Measured over simulated, less one."""
        return self.seconds / self.simulated - 1


@dataclass(frozen=True, slots=True)
class Emulation:
    """A run on a scale model. problem: what ran on it; target: what it stands for."""

    cluster: Cluster
    target: Problem
    problem: Problem
    compute: How
    scale: Scale
    latency_seconds: float
    passes: tuple[PassResult, ...]
    wires: int
    worst_difference: float | None = None


def attention_steps(timeline: Timeline, schedules: Sequence[Schedule]) -> tuple[float, ...]:
    """Seconds between the starts of successive attention kernels of a rank, on average over ranks."""
    starts = []
    for schedule in schedules:
        kernels = {
            span_name(step)
            for step in schedule.steps
            if isinstance(step, Compute) and step.kernel.operator.startswith("attention")
        }
        mine = [s for s in timeline.spans if s.rank == schedule.rank and s.kind == "compute"]
        starts.append(sorted(s.start for s in mine if s.name in kernels))
    return tuple(sum(gaps) / len(gaps) for gaps in zip(*([b - a for a, b in pairwise(t)] for t in starts)))


def computed_seconds(timeline: Timeline) -> float:
    """Seconds that all ranks together spent in kernels."""
    return sum(s.stop - s.start for s in timeline.spans if s.kind == "compute")


def to_json(emulation: Emulation) -> dict[str, Any]:
    """The figures of a run as plain JSON values."""
    e = emulation
    known = published(e.cluster.name, e.target)
    return {
        "cluster": e.cluster.name,
        "ranks": e.cluster.world_size,
        "compute": e.compute,
        "strategy": dict(zip(("forward", "backward"), strategies(e.target), strict=True)),
        "tokens": e.target.layout.tokens,
        "tokens_on_scale_model": e.problem.layout.tokens,
        "slowdown": e.scale.slowdown,
        "bytes_divided_by": e.scale.shrink,
        "rates_divided_by": e.scale.rates,
        "latency_seconds": e.latency_seconds,
        "links": e.wires,
        "worst_difference": e.worst_difference,
        "passes": {
            p.which: {
                "measured_seconds": p.seconds,
                "measured_all_seconds": list(p.measured),
                "kernels_late": list(p.late),
                "simulated_seconds": p.simulated,
                "error": p.error,
                "cluster_simulated_seconds": p.real,
                "cluster_measured_seconds": p.seconds / e.scale.slowdown,
                "sent_bytes": p.sent_bytes,
                "cluster_sent_bytes": p.sent_bytes_expected,
                "attention_steps_seconds": {
                    "measured": list(p.measured_steps),
                    "simulated": list(p.simulated_steps),
                    "cluster_simulated": list(p.real_steps),
                },
            }
            for p in e.passes
        },
        "published": asdict(known) if known else None,
    }
