"""How a cluster and a problem become small enough for one machine, in the same proportions.

Two numbers say it all. Time: everything takes `slowdown` times as long, compute and messages alike. Bytes: the
sequence is `shrink` times shorter, so every message is too; a held kernel takes its time all the same. Rates are
therefore divided by slowdown * shrink.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from counterpoint.cluster.cluster import Cluster, Level
from counterpoint.cluster.curves import Curve
from counterpoint.emulation.held import held_device
from counterpoint.schedule.schedule import Compute, Schedule
from counterpoint.simulator.cost import kernel_cost
from counterpoint.strategies.sequence.attention import AttentionProblem
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.strategies.sequence.linear import LinearProblem

Pair = tuple[int, int]
Problem = AttentionProblem | LinearProblem
P = TypeVar("P", bound=AttentionProblem | LinearProblem)

LINK_BYTES_PER_SECOND = 40e6  # what one rate-limited link of this kind keeps up with
ALL_BYTES_PER_SECOND = 160e6  # and all links of a machine together, on two cores
LEAST_SECONDS = 0.1  # a shorter pass would measure latencies and the scheduler
PASS_SECONDS = 1.5  # how long a pass of the scale model should take


@dataclass(frozen=True, slots=True)
class Scale:
    """The target's time and bytes over the scale model's: seconds * slowdown, bytes / shrink."""

    slowdown: float
    shrink: float

    @property
    def rates(self) -> float:
        """What rates are divided by."""
        return self.slowdown * self.shrink


def bytes_by_pair(schedules: Sequence[Schedule]) -> dict[Pair, int]:
    """Payload bytes that ranks send each other."""
    return {(s.rank, to): n for s in schedules for to, n in s.sent_bytes().items()}


def pair_rates(cluster: Cluster, schedules: Sequence[Schedule]) -> dict[Pair, float]:
    """Bytes/s that a pair of ranks attains alone, on average over the messages that it exchanges.

    The cluster's rates depend on the size of a message; a link of the scale model has one rate.
    """
    nbytes: dict[Pair, int] = defaultdict(int)
    seconds: dict[Pair, float] = defaultdict(float)
    for schedule in schedules:
        for pair, size in _messages(schedule):
            nbytes[pair] += size
            seconds[pair] += size / cluster.route(*pair).flow_bytes_per_second(size)
    return {pair: total / seconds[pair] for pair, total in nbytes.items() if total}


def _messages(schedule: Schedule) -> list[tuple[Pair, int]]:
    from counterpoint.schedule.schedule import Collective, Send

    found = []
    for step in schedule.steps:
        if isinstance(step, Send):
            found.append(((schedule.rank, step.to), schedule.nbytes(step.inputs)))
        elif isinstance(step, Collective):
            found += [((schedule.rank, to), schedule.nbytes(names)) for to, names in step.sends]
    return found


def choose_rates(cluster: Cluster, schedules: Sequence[Schedule], seconds: float) -> float:
    """What to divide a cluster's rates by so that this machine can carry the traffic.

    schedules: of all ranks, for all passes. seconds: the time (s) they take on the cluster.
    """
    rates = pair_rates(cluster, schedules)
    if not rates:
        return 1.0
    crossed = sum(n * len(cluster.route(*pair).resources) for pair, n in _totals(schedules).items())
    return max(1.0, max(rates.values()) / LINK_BYTES_PER_SECOND, crossed / seconds / ALL_BYTES_PER_SECOND)


def _totals(schedules: Sequence[Schedule]) -> dict[Pair, int]:
    total: dict[Pair, int] = defaultdict(int)
    for schedule in schedules:
        for pair, size in _messages(schedule):
            total[pair] += size
    return total


def shrunk(problem: P, shrink: float, dtype: str | None = None) -> P:
    """The problem over a sequence `shrink` times shorter; blocks of equal length stay equal.

    States of linear attention are as large whatever the length: there heads are fewer instead.
    """
    layout = problem.layout
    if isinstance(problem, LinearProblem):
        heads = max(1, round(problem.shape.heads / shrink))
        return replace(problem, shape=replace(problem.shape, heads=heads))
    unit = 2 * layout.world_size if layout.tokens % (2 * layout.world_size) == 0 else 1
    tokens = min(layout.tokens, max(2 * layout.world_size, unit * round(layout.tokens / shrink / unit)))
    shape = problem.shape if dtype is None else replace(problem.shape, dtype=dtype)
    return replace(problem, layout=SequenceLayout(layout.kind, tokens, layout.world_size), shape=shape)


def strategies(problem: Problem) -> tuple[str, str]:
    """Names of the forward and the backward strategy."""
    if isinstance(problem, LinearProblem):
        return str(problem.forward), str(problem.backward)
    return "/".join(map(str, problem.forward)), "/".join(map(str, problem.backward))


def same_steps(first: Sequence[Schedule], second: Sequence[Schedule]) -> bool:
    """Whether two sets of schedules have the same kinds of steps, peers and values, in the same order."""
    return len(first) == len(second) and all(_outline(a) == _outline(b) for a, b in zip(first, second))


def _outline(schedule: Schedule) -> list[tuple]:
    return [
        (
            type(step),
            step.stream,
            step.reads,
            tuple(v.name for v in step.writes),
            type(step.kernel) if isinstance(step, Compute) else getattr(step, "to", None),
        )
        for step in schedule.steps
    ]


def step_seconds(cluster: Cluster, schedule: Schedule) -> list[float]:
    """What every kernel of a rank's schedule takes on its device (s); 0 for other steps, and for views."""
    device, values = cluster.device(schedule.rank), schedule.values
    return [
        kernel_cost(device, step.kernel, [values[name].spec for name in step.inputs])[0]
        if isinstance(step, Compute)
        else 0.0
        for step in schedule.steps
    ]


def scaled_cluster(cluster: Cluster, scale: Scale, latency_seconds: float) -> Cluster:
    """The cluster that the scale model is: rates divided, compute held, latencies as they are here.

    Sizes at which rates were measured shrink with the messages.
    """
    devices = {}
    for name, device in cluster.devices.items():
        tiers = [
            replace(
                tier,
                size_bytes=int(tier.size_bytes / scale.shrink),
                peak_bytes_per_second=tier.peak_bytes_per_second / scale.rates,
                attained=_divided(tier.attained, scale),
            )
            for tier in device.memory
        ]
        devices[name] = replace(held_device(tiers), name=name)
    levels = tuple(_scaled_level(level, scale, latency_seconds) for level in cluster.levels)
    return replace(cluster, name=f"scale model of {cluster.name}", devices=devices, levels=levels)


def _scaled_level(level: Level, scale: Scale, latency: float) -> Level:
    receives = level.receive_bytes_per_second
    return replace(
        level,
        bytes_per_second=level.bytes_per_second / scale.rates,
        receive_bytes_per_second=receives / scale.rates if receives else None,
        peak_bytes_per_second=None,
        latency_seconds=latency,
        attained=_rebased(level.attained, level.latency_seconds, scale, latency),
        links=tuple(
            replace(
                link,
                bytes_per_second=link.bytes_per_second / scale.rates,
                latency_seconds=latency,
                attained=_rebased(link.attained, link.latency_seconds, scale, latency),
            )
            for link in level.links
        ),
        collectives={},
    )


def _divided(curve: Curve, scale: Scale) -> Curve:
    return Curve(tuple((size / scale.shrink, rate / scale.rates) for size, rate in curve.points))


def _rebased(curve: Curve | None, old_latency: float, scale: Scale, latency: float) -> Curve | None:
    """A curve of bytes over whole time, with the rates divided and one latency in the place of another."""
    if curve is None:
        return None
    flowing = _divided(curve.without(old_latency), scale)
    if flowing.is_constant:
        return flowing
    return Curve(tuple((size, size / (size / rate + latency)) for size, rate in flowing.points))
