"""What checks measure with: schedules, the simulator, and real processes. It remembers what has been run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from counterpoint.cluster.cluster import Cluster
from counterpoint.emulation.namespaces import Unsupported
from counterpoint.schedule.schedule import Collective, Schedule, Send
from counterpoint.schedule.timeline import Timeline
from counterpoint.strategies.sequence.attention import (
    AttentionProblem,
    AttentionShape,
    backward_schedule,
    forward_schedule,
    parse_choices,
)
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.strategies.sequence.linear import LinearProblem, parse_linear
from counterpoint.strategies.sequence.linear_builder import Decay, LinearShape

if TYPE_CHECKING:
    from counterpoint.emulation.result import Emulation

Pass = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True)
class Case:
    """An attention: strategy, sizes, ranks (outermost mesh axis first)."""

    strategy: str
    mesh: tuple[int, ...]
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    batch: int = 1
    dtype: str = "bfloat16"
    causal: bool = True
    layout: str = "zigzag"

    @property
    def ranks(self) -> int:
        return prod(self.mesh)

    def problem(self) -> AttentionProblem:
        shape = AttentionShape(self.batch, self.heads, self.kv_heads, self.head_dim, self.dtype)
        choices = parse_choices(self.strategy)
        layout = SequenceLayout(self.layout, self.tokens, self.ranks)
        return AttentionProblem(shape, layout, self.mesh, choices, choices, self.causal)

    def schedule(self, way: Pass, rank: int) -> Schedule:
        return (forward_schedule if way == "forward" else backward_schedule)(self.problem(), rank)

    def schedules(self, way: Pass) -> list[Schedule]:
        """Of all ranks, in rank order."""
        return [self.schedule(way, rank) for rank in range(self.ranks)]


@dataclass(frozen=True, slots=True)
class LinearCase:
    """A linear attention: strategy, ranks, sizes, decay form."""

    strategy: str
    ranks: int
    tokens: int
    heads: int
    key_dim: int = 128
    value_dim: int = 128
    decay: Decay = "none"
    batch: int = 1
    dtype: str = "bfloat16"
    causal: bool = True
    documents: tuple[int, ...] = ()

    @property
    def mesh(self) -> tuple[int, ...]:
        return (self.ranks,)

    def problem(self) -> LinearProblem:
        shape = LinearShape(self.batch, self.heads, self.key_dim, self.value_dim, self.decay, self.dtype)
        choice = parse_linear(self.strategy)
        layout = SequenceLayout("contiguous", self.tokens, self.ranks, self.documents)
        return LinearProblem(shape, layout, choice, choice, self.causal)

    def schedule(self, way: Pass, rank: int) -> Schedule:
        return self.problem().schedule(way, rank)

    def schedules(self, way: Pass) -> list[Schedule]:
        """Of all ranks, in rank order."""
        return [self.schedule(way, rank) for rank in range(self.ranks)]


AnyCase = Case | LinearCase


@dataclass(frozen=True, slots=True)
class Outcome:
    """What processes computed and sent: the worst difference of out, dq, dk, dv from one process, as a share of the
    largest value of each; and bytes that all ranks sent in the forward and in the backward pass."""

    difference: float
    forward_bytes: int
    backward_bytes: int


def traffic(schedules: Sequence[Schedule], channel: str | None = None) -> dict[tuple[int, int], int]:
    """Bytes by directed link (source, destination); of one channel ("out", with "out.even") only, if given."""
    total: dict[tuple[int, int], int] = {}
    for schedule in schedules:
        for step in schedule.steps:
            if not isinstance(step, Send | Collective):
                continue
            if channel and channel != step.channel and not step.channel.startswith(f"{channel}."):
                continue
            sends = [(step.to, step.inputs)] if isinstance(step, Send) else step.sends
            for to, names in sends:
                total[schedule.rank, to] = total.get((schedule.rank, to), 0) + schedule.nbytes(names)
    return total


def sent(schedules: Sequence[Schedule], channel: str | None = None) -> list[int]:
    """Bytes that every rank sends."""
    links = traffic(schedules, channel)
    return [sum(n for (source, _), n in links.items() if source == s.rank) for s in schedules]


@dataclass(slots=True)
class Bench:
    """environ: what local processes are started with. `exact` holds the cases that were run on them."""

    environ: Mapping[str, str]
    exact: dict[AnyCase, Outcome] = field(default_factory=dict)
    timelines: dict[tuple[AnyCase, Pass, str], Timeline] = field(default_factory=dict)
    emulated: dict[tuple[AnyCase, str], Emulation | Unsupported] = field(default_factory=dict)

    def outcome(self, case: AnyCase, among: Sequence[AnyCase]) -> Outcome:
        """A case on real local processes; all cases of `among` are run together, at the first need."""
        if case not in self.exact:
            self.exact |= run_processes(among, self.environ)
        return self.exact[case]

    def simulate(self, case: AnyCase, way: Pass, cluster: Cluster) -> Timeline:
        """The simulated pass; ranks that are alike are folded, so the timeline may hold fewer than there are."""
        from counterpoint.simulator.fold import fold
        from counterpoint.simulator.simulate import simulate

        key = case, way, cluster.name
        if key not in self.timelines:
            schedules, symmetry = fold(lambda rank: case.schedule(way, rank), case.mesh)
            self.timelines[key] = simulate(schedules, cluster, symmetry=symmetry)
        return self.timelines[key]

    def emulate(self, case: AnyCase, among: Sequence[AnyCase], cluster: Cluster) -> Emulation:
        """Both passes of a case on a scale model of a cluster, measured twice; all of `among` at the first need.

        Raises Unsupported (a ValueError): no rights or no kernel support for a scale model.
        """
        from counterpoint.emulation.emulate import emulate_all

        if (case, cluster.name) not in self.emulated:
            found: list[Emulation] | list[Unsupported]
            try:
                found = emulate_all(
                    cluster, [c.problem() for c in among], passes=("forward", "backward"), repetitions=2,
                    pass_seconds=0.8, environ=self.environ,
                )  # fmt: skip
            except Unsupported as error:
                found = [error] * len(among)
            self.emulated |= {(c, cluster.name): e for c, e in zip(among, found, strict=True)}
        known = self.emulated[case, cluster.name]
        if isinstance(known, Unsupported):
            raise known
        return known


def run_processes(cases: Sequence[AnyCase], environ: Mapping[str, str]) -> dict[AnyCase, Outcome]:
    """Run cases on local processes over gloo, as many as the largest case has ranks.

    Raises WorkerFailure (a RuntimeError) when a process fails.
    """
    from counterpoint.files import scratch
    from counterpoint.training.launch import launch

    with scratch() as folder:
        plan = Path(folder, "cases.json")
        plan.write_text(json.dumps([asdict(case) for case in cases]))
        ranks = max(case.ranks for case in cases)
        stopped = launch(["-m", "counterpoint", "reproduce-worker", str(plan)], ranks, environ)
        if stopped:
            raise KeyboardInterrupt
        found = json.loads(plan.with_name("outcomes.json").read_text())
    return {case: Outcome(**outcome) for case, outcome in zip(cases, found, strict=True)}


def read_cases(plan: Path) -> list[AnyCase]:
    """The cases that `run_processes` has written down."""
    return [_read_case(row) for row in json.loads(plan.read_text())]


def _read_case(row: dict[str, Any]) -> AnyCase:
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in row.items()
    }
    return LinearCase(**values) if "decay" in row else Case(**values)


_CLUSTER = """
name: {name}
about: devices of 100 TFLOP/s whose {about}, {rate} per direction; a model of a topology, not of a machine
devices:
  device:
    memory:
      hbm: {{size: 80 GB, bandwidth: 2000 GB/s, attained: 1600 GB/s}}
    peak: {{bfloat16: 100 TFLOP/s, float32: 100 TFLOP/s}}
    rates:
      matmul: {{bfloat16: 100 TFLOP/s, float32: 100 TFLOP/s}}
    launch: 1 us
levels:
  - level: node
    count: {ranks}
    link: {link}
    bandwidth: {rate}
    latency: 1 us
"""


@lru_cache(maxsize=8)
def topology(link: Literal["mesh", "switch"], ranks: int, rate: str = "1 GB/s") -> Cluster:
    """Equal devices joined by a link of their own for every pair (mesh), or by one port each (switch).

    Rates do not depend on message sizes, so that ratios of a formula can be seen.
    """
    from counterpoint.cluster.load import parse_cluster

    about = "every pair has its own link" if link == "mesh" else "traffic shares one port each"
    return parse_cluster(
        _CLUSTER.format(name=f"{link} of {ranks}", about=about, rate=rate, ranks=ranks, link=link)
    )
