"""What a group of ranks takes for one attention layer: the strategy's own schedule, costed and simulated.

Computing: every kernel of a rank's schedule, by its work and the device's curves. Communication: the schedules of
all ranks simulated on the group's places with devices that compute in no time. A ring's steps are alike, so a ring
of few ranks that crosses the same levels tells the time of a step, and a longer ring has more of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from counterpoint.cluster.cluster import Cluster
from counterpoint.cluster.curves import Curve
from counterpoint.cluster.device import WORK_CLASSES, Device
from counterpoint.kernels.attention import Attend, AttendBackward
from counterpoint.kernels.kernel import TensorSpec
from counterpoint.kernels.mask import Area
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.schedule import Collective, Compute, Schedule, Value
from counterpoint.simulator.cost import kernel_cost
from counterpoint.simulator.fold import fold
from counterpoint.simulator.simulate import simulate
from counterpoint.strategies.sequence.attention import (
    AttentionProblem,
    backward_schedule,
    forward_schedule,
    parse_choices,
)
from counterpoint.strategies.sequence.blocks import AttentionShape
from counterpoint.strategies.sequence.layout import SequenceLayout

GroupStrategy = Literal["ulysses", "ring"]
RINGS = (4, 6)  # ranks of the rings whose steps are timed

_PASSES: tuple[Callable[[AttentionProblem, int], Schedule], ...] = (forward_schedule, backward_schedule)


def problem(
    shape: AttentionShape, strategy: GroupStrategy, ranks: int, lengths: Sequence[int], *, causal: bool = True
) -> AttentionProblem:
    """Attention over packed sequences that are all split over the group's ranks."""
    choices = parse_choices(strategy)
    kind = "document-zigzag" if strategy == "ring" and causal else "contiguous"
    documents = tuple(lengths) if len(lengths) > 1 else ()
    layout = SequenceLayout(kind, sum(lengths), ranks, documents)
    return AttentionProblem(shape, layout, (ranks,), choices, choices, causal)


def compute_seconds(schedule: Schedule, device: Device, share: float = 1.0) -> float:
    """All kernels of a rank's schedule (s); `share` of the pairs are visible.

    One sequence of T tokens stands for many short ones of T in all: they have the same tensors and fewer pairs.
    """
    total = 0.0
    for step in schedule.steps:
        if not isinstance(step, Compute):
            continue
        kernel, inputs = step.kernel, [schedule.values[name].spec for name in step.inputs]
        if isinstance(kernel, Attend | AttendBackward) and share < 1.0:
            pairs = round(share * sum(a.pairs for a in kernel.areas))
            kernel = replace(kernel, areas=(Area(0, 1, 0, pairs),))
        total += kernel_cost(device, kernel, inputs)[0]
    return total


def compute(
    shape: AttentionShape,
    strategy: GroupStrategy,
    ranks: int,
    tokens: int,
    share: float,
    device: Device,
    known: dict[tuple, float],
) -> tuple[float, float]:
    """(forward, backward) seconds of a rank's kernels for `tokens` tokens a rank.

    share: visible pairs, of those that one sequence of all the tokens has. known: passes costed so far.
    """
    small = min(ranks, RINGS[1]) if strategy == "ring" else ranks

    def kernels(make: Callable[[AttentionProblem, int], Schedule], size: int) -> float:
        key = (device.name, make.__name__, strategy, size, tokens, share)
        if key not in known:
            known[key] = compute_seconds(
                make(problem(shape, strategy, size, (tokens * size,)), 0), device, share
            )
        return known[key]

    found = []
    for make in _PASSES:
        total = kernels(make, small)
        if small < ranks:  # the first step is the rank's own block, the others are alike
            own = kernels(make, 1)
            total = own + (total - own) * (ranks - 1) / (small - 1)
        found.append(total)
    return found[0], found[1]


def communication(
    shape: AttentionShape,
    strategy: GroupStrategy,
    places: Sequence[int],
    loads: Sequence[int],
    cluster: Cluster,
    forwards: int,
    known: dict[Probe, float],
) -> tuple[list[float], list[float]]:
    """(messages that computing never hides, messages that it may hide) of a layer, forward and backward, in seconds.

    One figure for each number of tokens a rank; `forwards` forward passes (2 where layers are recomputed). A ring's
    last gradients travel home when all is computed. known: probes of short rings so far, to be shared.
    """
    if len(places) == 1:
        return [0.0 for _ in loads], [0.0 for _ in loads]
    if strategy == "ulysses":
        return [forwards * f + b for f, b in _exchanges(shape, places, loads, cluster)], [0.0 for _ in loads]
    count, tier = len(places), cluster.tier(places)
    rings = [min(count, n) for n in RINGS]
    bare, hideable = [], []
    for tokens in loads:
        total = last = 0.0
        for way, times in zip((0, 1), (forwards, 1), strict=True):
            took = [
                Probe(shape, way, _crossing(cluster, tier, ring), tokens, False).seconds(cluster, known)
                for ring in rings
            ]
            # a longer ring has more steps, all alike
            step = (took[1] - took[0]) / (rings[1] - rings[0]) if rings[0] < rings[1] else 0.0
            total += times * (took[0] + step * (count - rings[0]))
            behind = Probe(shape, way, _crossing(cluster, tier, rings[0]), tokens, True)
            last += times * behind.seconds(cluster, known)
        bare.append(min(last, total))
        hideable.append(total - min(last, total))
    return bare, hideable


def sent_bytes(
    shape: AttentionShape, strategy: GroupStrategy, ranks: int, tokens: int, forwards: int
) -> float:
    """Bytes that a rank sends in a layer's passes, counted in their schedules."""

    def of(size: int) -> int:
        asked = problem(shape, strategy, size, (tokens * size,))
        passes = zip(_PASSES, (forwards, 1), strict=True)
        return sum(times * sum(make(asked, 0).sent_bytes().values()) for make, times in passes)

    if strategy == "ulysses" or ranks <= RINGS[1]:
        return of(ranks)
    few, more = map(of, RINGS)
    return few + (more - few) / (RINGS[1] - RINGS[0]) * (ranks - RINGS[0])


@dataclass(frozen=True, slots=True)
class Probe:
    """A pass (0 forward, 1 backward) of a short ring on these places of a cluster, with `tokens` tokens a rank.

    behind: the time of messages that are left when computing takes for ever; else that of messages when nothing is
    computed.
    """

    shape: AttentionShape
    way: int
    places: tuple[int, ...]
    tokens: int
    behind: bool

    def seconds(self, cluster: Cluster, known: dict[Probe, float]) -> float:
        """Found by simulation once, and kept in `known`."""
        if self not in known:
            asked = problem(self.shape, "ring", len(self.places), (self.tokens * len(self.places),))
            schedules, symmetry = fold(partial(_PASSES[self.way], asked), (len(self.places),))
            where = _with_rates(cluster, 1e3 if self.behind else 1e30)
            line = simulate(schedules, where, placement=list(self.places), symmetry=symmetry)
            busy = max(line.categories(rank)["compute"] for rank in line.ranks) if self.behind else 0.0
            known[self] = line.seconds - busy
        return known[self]


def _exchanges(
    shape: AttentionShape, places: Sequence[int], loads: Sequence[int], cluster: Cluster
) -> list[tuple[float, float]]:
    """Ulysses' exchanges of all loads and both passes in one simulation, which finds the ways between ranks once."""
    size = len(places)
    parts = [
        (load, way, problem(shape, "ulysses", size, (tokens * size,)))
        for load, tokens in enumerate(loads)
        for way in (0, 1)
    ]

    def alone(rank: int) -> Schedule:
        b = Builder("exchanges", rank, size)
        own: dict[int, Value] = {}
        for _, way, asked in parts:
            schedule = _PASSES[way](asked, rank)
            for step in schedule.steps:
                if not isinstance(step, Collective):
                    continue
                sends = {to: schedule.nbytes(names) for to, names in step.sends}
                recvs = {source: sum(v.spec.nbytes for v in made) for source, made in step.recvs}
                for nbytes in sends.values():
                    if nbytes not in own:
                        own[nbytes] = b.input(f"own{nbytes}", TensorSpec((nbytes,), "uint8"))
                b.collective(
                    step.kind,
                    "exchanges",
                    {to: [own[n]] for to, n in sends.items()},
                    {source: [("got", TensorSpec((n,), "uint8"))] for source, n in recvs.items()},
                )
        return b.finish({})

    schedules, symmetry = fold(alone, (size,))
    timeline = simulate(schedules, _with_rates(cluster, 1e30), placement=list(places), symmetry=symmetry)
    first = iter(
        [s.seconds for s in timeline.spans if s.rank == timeline.ranks[0] and s.kind == "collective"]
    )
    found = [[0.0, 0.0] for _ in loads]
    for load, way, asked in parts:
        for step in _PASSES[way](asked, 0).steps:
            if isinstance(step, Collective):
                found[load][way] += next(first)
    return [(forward, backward) for forward, backward in found]


def simulated(
    shape: AttentionShape,
    strategy: GroupStrategy,
    places: Sequence[int],
    lengths: Sequence[int],
    cluster: Cluster,
) -> tuple[float, float]:
    """(forward, backward) seconds of a layer with its messages: what the fit has to meet."""
    asked = problem(shape, strategy, len(places), tuple(lengths))
    found = []
    for make in _PASSES:
        schedules, symmetry = fold(partial(make, asked), (len(places),))
        found.append(simulate(schedules, cluster, placement=list(places), symmetry=symmetry).seconds)
    return found[0], found[1]


def _crossing(cluster: Cluster, tier: int, count: int) -> tuple[int, ...]:
    """`count` neighbouring ranks around the first border of a level, half of them on either side."""
    border = cluster.sizes[tier - 1] if tier else count // 2
    first = max(0, border - count // 2)
    return tuple(range(first, first + count))


def _with_rates(cluster: Cluster, flops_per_second: float) -> Cluster:
    """The same links between devices that attend at this rate, do all else in no time, and never run out of memory."""
    devices = {
        name: replace(
            device,
            rates={
                c: dict.fromkeys(device.peak_flops_per_second, Curve.constant(flops_per_second))
                for c in WORK_CLASSES
                if c != "elementwise"
            },
            memory=tuple(
                replace(tier, size_bytes=1 << 60, attained=Curve.constant(1e30)) for tier in device.memory
            ),
            launch_seconds=0.0,
        )
        for name, device in cluster.devices.items()
    }
    return replace(cluster, devices=devices)
