"""Ranks that are alike: one of each kind is simulated and stands for all of them.

If turning the mesh along some axes maps every rank's schedule onto that of another rank, and the cluster looks the
same from both, then whatever happens on one happens on the other at the same time: the event loop is deterministic
and max-min fair rates depend only on which flows share which resources. So one rank of every kind is run; a message
to another rank is received by the one that stands for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from counterpoint.schedule.schedule import Collective, Compute, Recv, Schedule, Send


@dataclass(frozen=True, slots=True)
class Symmetry:
    """The mesh, numbered row by row, looks the same to ranks that differ only in their places along `axes`.

    No axes: every rank stands for itself.
    """

    mesh: tuple[int, ...]
    axes: tuple[int, ...] = ()

    @property
    def world_size(self) -> int:
        return prod(self.mesh)

    @property
    def size(self) -> int:
        """How many ranks one stands for."""
        return prod(self.mesh[axis] for axis in self.axes)

    def representatives(self) -> list[int]:
        """The ranks that are simulated: those at place 0 of every folded axis."""
        places = (range(1 if axis in self.axes else size) for axis, size in enumerate(self.mesh))
        return [self._rank(at) for at in product(*places)]

    def turns(self) -> Iterator[tuple[int, ...]]:
        """All ways to turn the mesh, by places along every axis; the first one leaves it as it is."""
        return product(*(range(size if axis in self.axes else 1) for axis, size in enumerate(self.mesh)))

    def turned(self, rank: int, turn: Sequence[int]) -> int:
        """Where a rank comes to lie."""
        return self._rank((a + b) % n for a, b, n in zip(self._places(rank), turn, self.mesh, strict=True))

    def seen_from(self, rank: int, peer: int) -> int:
        """The rank that lies to the rank standing for `rank` as `peer` lies to `rank`."""
        if not self.axes:
            return peer
        own = self._places(rank)
        return self.turned(peer, [-own[axis] if axis in self.axes else 0 for axis in range(len(self.mesh))])

    def representative(self, rank: int) -> int:
        """The rank that stands for this one."""
        return self.seen_from(rank, rank)

    def _places(self, rank: int) -> list[int]:
        places = []
        for size in reversed(self.mesh):
            rank, place = divmod(rank, size)
            places.append(place)
        return places[::-1]

    def _rank(self, places) -> int:
        rank = 0
        for size, place in zip(self.mesh, places, strict=True):
            rank = rank * size + place
        return rank


def fold(schedule_of: Callable[[int], Schedule], mesh: Sequence[int]) -> tuple[list[Schedule], Symmetry]:
    """The schedules that must be simulated, and the symmetry under which they stand for all others.

    schedule_of: the schedule of a rank. Axes are folded when the schedules of ranks turned by one place, forwards and
    backwards, along every such axis are those of the first rank step by step: the same work, bytes, order and
    dependencies, with peers turned likewise. Axes along which ranks differ are not folded, and all their ranks built.
    """
    mesh = tuple(mesh)
    for axes in _candidates(mesh):
        symmetry = Symmetry(mesh, axes)
        ahead = [1 if axis in axes else 0 for axis in range(len(mesh))]
        turned = {symmetry.turned(0, ahead), symmetry.turned(0, [-n for n in ahead])}
        first = signature(schedule_of(0), symmetry)
        if all(signature(schedule_of(rank), symmetry) == first for rank in turned):
            return [schedule_of(rank) for rank in symmetry.representatives()], symmetry
    return [schedule_of(rank) for rank in range(prod(mesh))], Symmetry(mesh)


def _candidates(mesh: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Sets of axes to fold, those that save most first."""
    axes = [axis for axis, size in enumerate(mesh) if size > 1]
    sets = [
        tuple(a for a, keep in zip(axes, kept, strict=True) if keep)
        for kept in product((1, 0), repeat=len(axes))
    ]
    yield from sorted((s for s in sets if s), key=lambda s: -prod(mesh[axis] for axis in s))


def signature(schedule: Schedule, symmetry: Symmetry) -> list[tuple]:
    """What a schedule does, step by step, in terms that are equal on ranks that are alike."""
    number = {v.name: i for i, v in enumerate(schedule.inputs)}
    rows: list[tuple] = [tuple(v.spec for v in schedule.inputs), tuple(sorted(schedule.depths.items()))]

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
        rows.append(what)
    rows.append(tuple((key, number[name]) for key, name in schedule.outputs.items()))
    return rows
