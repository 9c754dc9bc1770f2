"""Collectives whose time the cluster has measured: they happen as a whole, when all who exchange messages have come."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from counterpoint.cluster.cluster import Cluster
from counterpoint.schedule.schedule import Collective

Meeting = tuple[list[int], float]  # steps, seconds


@dataclass(frozen=True, slots=True)
class Message:
    """A matched message between steps."""

    sender: int
    receiver: int
    nbytes: int
    source: int  # ranks
    destination: int


def meet(
    messages: Sequence[Message],
    collective: Callable[[int], Collective | None],
    cluster: Cluster,
    places: Sequence[int],
) -> tuple[list[Message], list[Meeting]]:
    """The messages that remain, and the collectives that replace the others.

    Steps that exchange messages belong to one collective. Its size is the bytes that a rank sends, at most, and its
    ranks are those that one of them exchanges messages with. collective: the step with a number, if it is one.
    """
    group: dict[int, int] = {}  # a step to one that is closer to the group's root
    sent: dict[int, int] = defaultdict(int)
    ranks: dict[int, set[int]] = defaultdict(set)

    def root(step: int) -> int:
        while group.setdefault(step, step) != step:
            step = group[step]
        return step

    for m in messages:
        if collective(m.sender) and collective(m.receiver):
            first, other = sorted((root(m.sender), root(m.receiver)))
            group[other] = first
            sent[m.sender] += m.nbytes
            ranks[m.sender] |= {m.source, m.destination}
    members: dict[int, list[int]] = defaultdict(list)
    for step in sorted(group):
        members[root(step)].append(step)
    meetings: dict[int, Meeting] = {}
    for first, steps in members.items():
        step = collective(first)
        assert step is not None
        widest = max((ranks[s] for s in steps), key=len)
        most = max(sent[s] for s in steps)
        seconds = cluster.collective_seconds(step.kind, sorted(places[rank] for rank in widest), most)
        if seconds is not None:
            meetings[first] = (steps, seconds)
    left = [m for m in messages if m.sender not in group or root(m.sender) not in meetings]
    return left, list(meetings.values())
