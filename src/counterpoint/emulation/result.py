"""What a run on a scale model measured, beside what was simulated."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from counterpoint.cluster.cluster import Cluster
from counterpoint.emulation.published import published
from counterpoint.emulation.scale import Scale
from counterpoint.emulation.worker import Pass
from counterpoint.schedule.timeline import Timeline
from counterpoint.strategies.sequence.attention import AttentionProblem

Compute = Literal["timed", "real"]


@dataclass(frozen=True, slots=True)
class PassResult:
    """One pass: what was measured on the scale model (all repetitions, s), and what was simulated (s).

    timelines: of the repetition in the middle, and of the scale model's simulation.
    """

    which: Pass
    measured: tuple[float, ...]
    simulated: float
    real: float
    sent_bytes: int
    sent_bytes_expected: int
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
    target: AttentionProblem
    problem: AttentionProblem
    compute: Compute
    scale: Scale
    latency_seconds: float
    passes: tuple[PassResult, ...]
    wires: int
    worst_difference: float | None = None


def attention_steps(timeline: Timeline) -> tuple[float, ...]:
    """Seconds between the starts of successive attention kernels of a rank, on average over ranks."""
    starts = [
        sorted(s.start for s in timeline.spans if s.rank == rank and s.kind == "compute" and s.flops)
        for rank in timeline.ranks
    ]
    count = min(map(len, starts))
    return tuple(sum(times[i + 1] - times[i] for times in starts) / len(starts) for i in range(count - 1))


def to_json(emulation: Emulation) -> dict[str, Any]:
    """The figures of a run as plain JSON values."""
    e = emulation
    known = published(e.cluster.name, e.target)
    return {
        "cluster": e.cluster.name,
        "ranks": e.cluster.world_size,
        "compute": e.compute,
        "strategy": {
            "forward": "/".join(map(str, e.target.forward)),
            "backward": "/".join(map(str, e.target.backward)),
        },
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
                "simulated_seconds": p.simulated,
                "error": p.error,
                "cluster_simulated_seconds": p.real,
                "cluster_measured_seconds": p.seconds / e.scale.slowdown,
                "sent_bytes": p.sent_bytes,
                "cluster_sent_bytes": p.sent_bytes_expected,
                "attention_steps_seconds": {
                    "measured": list(attention_steps(p.measured_timeline)),
                    "simulated": list(attention_steps(p.simulated_timeline)),
                    "cluster_simulated": list(attention_steps(p.real_timeline)),
                },
            }
            for p in e.passes
        },
        "published": asdict(known) if known else None,
    }
