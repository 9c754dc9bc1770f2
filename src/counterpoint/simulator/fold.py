"""Ranks that are alike: one of each kind is simulated and stands for all of them.

If turning the mesh along some axes maps every rank's schedule onto that of another rank, and the cluster looks the
same from both, then whatever happens on one happens on the other at the same time: the event loop is deterministic
and max-min fair rates depend only on which flows share which resources. So one rank of every kind is run; a message
to another rank is received by the one that stands for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest
from math import prod

from counterpoint.schedule.schedule import Collective, Compute, Recv, Schedule, Send
from counterpoint.simulator.garbage import no_garbage_collection


@dataclass(frozen=True, slots=True)
class Symmetry:
    """A mesh, numbered row by row, that looks the same to ranks which lie whole strides apart.

    strides: per axis a divisor of its size; 1 where all places are alike, the size where none are. The ranks at the
    first `stride` places of every axis stand for the others. No strides: every rank stands for itself.
    """

    mesh: tuple[int, ...]
    strides: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.strides:
            object.__setattr__(self, "strides", self.mesh)
        pairs = zip(self.mesh, self.strides, strict=False)
        if len(self.mesh) != len(self.strides) or any(stride < 1 or size % stride for size, stride in pairs):
            raise ValueError(f"strides {self.strides} do not divide the axes of the mesh {self.mesh}")

    @property
    def world_size(self) -> int:
        return prod(self.mesh)

    @property
    def folded(self) -> bool:
        return self.strides != self.mesh

    def representatives(self) -> list[int]:
        """The ranks that stand for all, in ascending order."""
        return [self.turned(0, at) for at in product(*map(range, self.strides))]

    def turns(self) -> Iterator[tuple[int, ...]]:
        """All ways to turn the mesh without a visible change; the first one leaves it as it is."""
        return product(
            *(range(0, size, stride) for size, stride in zip(self.mesh, self.strides, strict=True))
        )

    def turned(self, rank: int, turn: Sequence[int]) -> int:
        """Where a rank comes to lie."""
        there, unit = 0, 1
        for size, by in zip(reversed(self.mesh), reversed(turn), strict=True):
            rank, place = divmod(rank, size)
            there += (place + by) % size * unit
            unit *= size
        return there

    def seen_from(self, rank: int, peer: int) -> int:
        """The rank that lies to the rank standing for `rank` as `peer` lies to `rank`."""
        if not self.folded:
            return peer
        return self.turned(
            peer, [-(a // n * n) for a, n in zip(self._places(rank), self.strides, strict=True)]
        )

    def representative(self, rank: int) -> int:
        """The rank that stands for this one."""
        return self.seen_from(rank, rank)

    def weaker(self) -> Iterator[Symmetry]:
        """This symmetry and all that it contains, those that fold most first."""
        choices = (
            [n for n in range(stride, size + 1) if size % n == 0 and n % stride == 0]
            for size, stride in zip(self.mesh, self.strides, strict=True)
        )
        yield from (Symmetry(self.mesh, strides) for strides in sorted(product(*choices), key=prod))

    def copies(self, weaker: Symmetry) -> list[tuple[int, ...]]:
        """The turns that lead from this symmetry's representatives to those of a weaker one."""
        pairs = zip(weaker.strides, self.strides, strict=True)
        return list(product(*(range(0, stop, stride) for stop, stride in pairs)))

    def copy_of(self, rank: int) -> tuple[int, ...]:
        """The turn that leads from the representative to this rank."""
        return tuple(a // n * n for a, n in zip(self._places(rank), self.strides, strict=True))

    def _places(self, rank: int) -> list[int]:
        places = []
        for size in reversed(self.mesh):
            rank, place = divmod(rank, size)
            places.append(place)
        return places[::-1]


@no_garbage_collection()
def fold(schedule_of: Callable[[int], Schedule], mesh: Sequence[int]) -> tuple[list[Schedule], Symmetry]:
    """The schedules that must be simulated, and the symmetry under which they stand for all others.

    schedule_of: the schedule of a rank. Axes are folded when the schedules of ranks turned by one place, forwards and
    backwards, along every such axis are those of the first rank step by step: the same work, bytes, order and
    dependencies, with peers turned likewise. Axes along which ranks differ are not folded, and all their ranks built.
    """
    mesh = tuple(mesh)
    sizes = sorted(product(*((1, size) if size > 1 else (1,) for size in mesh)), key=prod)
    for symmetry in (Symmetry(mesh, strides) for strides in sizes if strides != mesh):
        ahead = [int(stride < size) for size, stride in zip(mesh, symmetry.strides, strict=True)]
        turned = {symmetry.turned(0, ahead), symmetry.turned(0, [-n for n in ahead])}
        if all(_alike(schedule_of(0), schedule_of(rank), symmetry) for rank in turned):
            return [schedule_of(rank) for rank in symmetry.representatives()], symmetry
    return [schedule_of(rank) for rank in range(prod(mesh))], Symmetry(mesh)


def _alike(one: Schedule, other: Schedule, symmetry: Symmetry) -> bool:
    rows = zip_longest(signature(one, symmetry), signature(other, symmetry))
    return all(a == b for a, b in rows)


def signature(schedule: Schedule, symmetry: Symmetry) -> Iterator[tuple]:
    """What a schedule does, step by step, in terms that are equal on ranks that are alike."""
    number = {v.name: i for i, v in enumerate(schedule.inputs)}
    yield tuple(v.spec for v in schedule.inputs), tuple(sorted(schedule.depths.items()))

    def values(names: Sequence[str]) -> tuple[int, ...]:
        return tuple(sorted({number[name] for name in names}))

    def seen(peer: int) -> int:
        return symmetry.seen_from(schedule.rank, peer)

    for step in schedule.steps:
        reads = values(step.reads)
        for value in step.writes:
            number[value.name] = len(number)
        what: tuple = (step.stream, reads, tuple(v.spec for v in step.writes))
        if isinstance(step, Compute):
            kernel = step.kernel
            work = kernel.work(*(schedule.values[name].spec for name in step.inputs))
            shared = tuple((i, number[step.inputs[j]]) for i, j in kernel.aliases.items())
            what += (type(kernel), work, shared)
        elif isinstance(step, Send):
            what += (seen(step.to),)
        elif isinstance(step, Recv):
            what += (seen(step.source),)
        elif isinstance(step, Collective):
            sends = tuple((seen(to), values(names)) for to, names in step.sends)
            recvs = tuple((seen(source), tuple(v.spec for v in made)) for source, made in step.recvs)
            what += (step.kind, sends, recvs)
        else:
            what += (step.tier,)
        yield what
    yield tuple((key, number[name]) for key, name in schedule.outputs.items())
