"""From schedules and a cluster to a program."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from counterpoint.cluster.cluster import Cluster
from counterpoint.kernels.kernel import TensorSpec
from counterpoint.schedule.check import check_messages
from counterpoint.schedule.schedule import Collective, Compute, Copy, Recv, Schedule, Send
from counterpoint.simulator.cost import kernel_cost
from counterpoint.simulator.fold import Symmetry
from counterpoint.simulator.program import COPY, EXCHANGE, MEETING, RECV, TIMED, Array, Program, lists
from counterpoint.simulator.routes import DEVICE, Routes

Collectives = Literal["direct", "measured"]
Key = tuple[int, int, str]  # source as the receiver sees it, the rank that stands for the receiver, channel
End = tuple[int, int]  # step, bytes


@dataclass(slots=True)
class Lists:
    """Items of several owners, in the order in which they came."""

    owners: list[int] = field(default_factory=list)
    items: list[int] = field(default_factory=list)

    def add(self, owner: int, item: int) -> None:
        self.owners.append(owner)
        self.items.append(item)


@dataclass(frozen=True, slots=True)
class Message:
    """A matched message between steps."""

    sender: int
    receiver: int
    nbytes: int
    source: int  # ranks
    destination: int


class Compiler:
    """Collects the arrays of a program, schedule by schedule.

    After `finish`, `flops` and `wire` hold the work and the bytes on the wire of every step, `names` those of buffers.
    """

    def __init__(self, cluster: Cluster, places: Sequence[int], symmetry: Symmetry) -> None:
        self.cluster, self.places, self.symmetry = cluster, places, symmetry
        self.routes = Routes(cluster, places, symmetry)
        self.schedules: list[Schedule] = []
        self.bases: list[int] = []  # number of a schedule's first step
        self.rank: list[int] = []
        self.kind: list[int] = []
        self.stream: list[int] = []
        self.following: list[int] = []
        self.seconds: list[float] = []
        self.waits: list[int] = []
        self.flops: list[int] = []
        self.wire: list[int] = []
        self.successors, self.reads, self.makes = Lists(), Lists(), Lists()
        self.outgoing, self.incoming = Lists(), Lists()
        self.first: list[int] = []
        self.depth: list[int] = []
        self.names: list[str] = []
        self._buffers: list[tuple[int, int, bool, int, bool]] = []  # bytes, readers, kept, source, fast
        self._flows: list[
            tuple[int, int, int, int, float, float]
        ] = []  # sender, receiver, bytes, route, latency, limit
        self._sent: dict[Key, list[End]] = defaultdict(list)
        self._received: dict[Key, list[End]] = defaultdict(list)
        self._destination: dict[Key, int] = {}
        self._costs: dict[tuple, tuple[float, int]] = {}

    def add(self, schedule: Schedule) -> None:
        """The steps of one rank."""
        memory, values = schedule.memory, schedule.values
        base, device = len(self.rank), self.cluster.device(self.places[schedule.rank])
        self._add_streams(schedule, base)
        sizes = {name: value.nbytes for name, value in values.items()}
        maker: dict[str, int] = {}
        tier = {v.name: DEVICE for v in schedule.inputs}
        buffer: dict[str, int] = {}

        def allocate(name: str, source: int, where: str) -> None:
            kept, readers = name in memory.kept, memory.readers[name]
            buffer[name] = len(self._buffers)
            self._buffers.append((sizes[name], readers, kept, source, where == DEVICE))
            self.names.append(name)

        for value in schedule.inputs:
            allocate(value.name, -1, DEVICE)
        for number, step in enumerate(schedule.steps, base):
            reads = step.reads
            for source in {maker[name] for name in reads if name in maker}:
                self.waits[number] += 1
                self.successors.add(source, number)
            for root in dict.fromkeys([memory.root[name] for name in reads]):
                self.reads.add(number, buffer[root])
            kind, where = EXCHANGE, DEVICE
            if isinstance(step, Compute):
                kind = TIMED
                key = (device.name, step.kernel, tuple([values[name].spec for name in reads]))
                self.seconds[number], self.flops[number] = self._cost(key, device)
                where = tier[reads[0]] if reads and step.kernel.aliases else DEVICE
            elif isinstance(step, Send):
                self._send(number, schedule.rank, step.to, step.channel, sum([sizes[name] for name in reads]))
            elif isinstance(step, Recv):
                kind = RECV
                received = sum([sizes[v.name] for v in step.outputs])
                self._receive(number, schedule.rank, step.source, step.channel, received)
                self.wire[number] = received
            elif isinstance(step, Collective):
                for to, names in step.sends:
                    self._send(number, schedule.rank, to, step.channel, sum([sizes[name] for name in names]))
                for source, made in step.recvs:
                    received = sum([sizes[v.name] for v in made])
                    self._receive(number, schedule.rank, source, step.channel, received)
            else:
                kind, where = COPY, DEVICE if step.tier == device.memory[0].name else step.tier
                self._copy(number, schedule.rank, step, tier[step.input], where)
            self.kind[number] = kind
            for value in step.writes:
                maker[value.name], tier[value.name] = number, where
                if memory.root[value.name] == value.name:
                    allocate(value.name, number if kind == RECV else -1, where)
                    self.makes.add(number, buffer[value.name])

    def finish(self, collectives: Collectives) -> Program:
        """The program of all schedules that were added. Raises ScheduleError for a message without counterpart."""
        messages = self._match()
        meetings: list[tuple[list[int], float]] = []
        if collectives == "measured":
            messages, meetings = self._meet(messages)
        for m in messages:
            route, latency, limit = self.routes.message(m.source, m.destination, m.nbytes)
            self.incoming.add(m.receiver, len(self._flows))
            self.outgoing.add(m.sender, len(self._flows))
            self._flows.append((m.sender, m.receiver, m.nbytes, route, latency, limit))
        slots = self._slots()
        for i, (members, _) in enumerate(meetings):
            for step in members:
                self.kind[step] = MEETING
                self.outgoing.add(step, i)
        self.routes.check_devices()
        return self._program(meetings, slots)

    def _program(self, meetings: list[tuple[list[int], float]], slots: int) -> Program:
        n = len(self.rank)
        size, readers, kept, source, fast = _columns(self._buffers, 5)
        sender, receiver, nbytes, route, latency, limit = _columns(self._flows, 6)
        successors_at, successors = lists(self.successors.owners, self.successors.items, n)
        reads_at, reads = lists(self.reads.owners, self.reads.items, n)
        makes_at, makes = lists(self.makes.owners, self.makes.items, n)
        outgoing_at, outgoing = lists(self.outgoing.owners, self.outgoing.items, n)
        incoming_at, incoming = lists(self.incoming.owners, self.incoming.items, n)
        route_at, route_resources, route_weights, capacity = self.routes.arrays()
        members = [(i, step) for i, (steps, _) in enumerate(meetings) for step in steps]
        meeting_at, meeting_steps = lists(
            [i for i, _ in members], [step for _, step in members], len(meetings)
        )
        devices = [self.cluster.device(self.places[s.rank]) for s in self.schedules]
        return Program(
            rank=_ints(self.rank), kind=_ints(self.kind), stream=_ints(self.stream),
            following=_ints(self.following), seconds=np.array(self.seconds, np.float64), waits=_ints(self.waits),
            successors_at=successors_at, successors=successors, reads_at=reads_at, reads=reads,
            makes_at=makes_at, makes=makes, outgoing_at=outgoing_at, outgoing=outgoing,
            incoming_at=incoming_at, incoming=incoming, first=_ints(self.first), depth=_ints(self.depth),
            buffer_bytes=_ints(size), buffer_readers=_ints(readers), buffer_kept=np.array(kept, np.bool_),
            buffer_source=_ints(source), buffer_fast=np.array(fast, np.bool_),
            message_sender=_ints(sender), message_receiver=_ints(receiver), message_bytes=_ints(nbytes),
            message_latency=np.array(latency, np.float64), message_limit=np.array(limit, np.float64),
            message_route=_ints(route), route_at=route_at, route_resources=route_resources,
            route_weights=route_weights, capacity=capacity, meeting_at=meeting_at, meeting_steps=meeting_steps,
            meeting_members=np.diff(meeting_at), meeting_seconds=np.array([t for _, t in meetings], np.float64),
            live=_ints([sum(v.nbytes for v in s.inputs) for s in self.schedules]),
            limit=_ints([device.memory_bytes for device in devices]), slots=slots,
        )  # fmt: skip

    def _add_streams(self, schedule: Schedule, base: int) -> None:
        n = len(schedule.steps)
        self.rank += [len(self.schedules)] * n
        self.schedules.append(schedule)
        self.bases.append(base)
        for column in (self.kind, self.stream, self.waits, self.flops, self.wire):
            column += [0] * n
        self.following += [-1] * n
        self.seconds += [0.0] * n
        for indices in schedule.streams.values():
            number, step = len(self.first), schedule.steps[indices[0]]
            self.first.append(base + indices[0])
            self.depth.append(schedule.depth(step.channel) if isinstance(step, Recv) else 0)
            before = None
            for i in indices:
                self.stream[base + i] = number
                if before is not None:
                    self.following[base + before] = base + i
                    self.waits[base + i] = 1
                before = i

    def _cost(self, key: tuple[str, object, tuple[TensorSpec, ...]], device) -> tuple[float, int]:
        if key not in self._costs:
            self._costs[key] = kernel_cost(device, key[1], key[2])  # type: ignore[arg-type]
        return self._costs[key]

    def _send(self, step: int, rank: int, to: int, channel: str, nbytes: int) -> None:
        key = (self.symmetry.seen_from(to, rank), self.symmetry.representative(to), channel)
        self._sent[key].append((step, nbytes))
        self._destination[key] = to
        self.wire[step] += nbytes

    def _receive(self, step: int, rank: int, source: int, channel: str, nbytes: int) -> None:
        self._received[source, rank, channel].append((step, nbytes))

    def _copy(self, number: int, rank: int, step: Copy, source: str, target: str) -> None:
        nbytes = step.output.nbytes
        route, latency, limit = self.routes.copy(rank, source, target, nbytes)
        self.outgoing.add(number, len(self._flows))
        self._flows.append((number, -1, nbytes, route, latency, limit))

    def _match(self) -> list[Message]:
        """The n-th message from one rank to another on a channel meets the n-th receive."""
        messages = []
        for key in self._sent.keys() | self._received.keys():
            sent, received = self._sent.get(key, []), self._received.get(key, [])
            if [n for _, n in sent] != [n for _, n in received]:
                if not self.symmetry.axes:
                    check_messages(self.schedules)
                raise ValueError(
                    f"rank {key[1]} does not receive on {key[2]} what ranks send that lie to it as rank {key[0]} does: "
                    f"the schedules are not those of ranks that are alike"
                )
        for key, sent in self._sent.items():
            # Both ends as the sender sees them: it stands for the ranks that lie to their receivers as it does.
            destination = self._destination[key]
            for (sender, nbytes), (receiver, _) in zip(sent, self._received[key], strict=True):
                source = self.schedules[self.rank[sender]].rank
                messages.append(Message(sender, receiver, nbytes, source, destination))
        return messages

    def _meet(self, messages: list[Message]) -> tuple[list[Message], list[tuple[list[int], float]]]:
        """Collectives whose time the cluster has measured: they happen when all who exchange messages have come.

        Returns the other messages; and the steps and the time (s) of every such collective.
        """
        group: dict[int, int] = {}  # a step to one that is closer to the group's root

        def root(step: int) -> int:
            while group.setdefault(step, step) != step:
                step = group[step]
            return step

        joined = [m for m in messages if self._collective(m.sender) and self._collective(m.receiver)]
        for m in joined:
            a, b = sorted((root(m.sender), root(m.receiver)))
            group[b] = a
        members: dict[int, list[int]] = defaultdict(list)
        for step in sorted(group):
            members[root(step)].append(step)
        meetings: dict[int, tuple[list[int], float]] = {}
        for first, steps in members.items():
            exchanges = [(self._collective(step), self.schedules[self.rank[step]].rank) for step in steps]
            ranks = [{rank, *(p for p, _ in (*c.sends, *c.recvs))} for c, rank in exchanges if c]
            places = [self.places[rank] for rank in max(ranks, key=len)]
            kind = exchanges[0][0]
            assert kind is not None
            seconds = self.cluster.collective_seconds(
                kind.kind, places, max(self.wire[step] for step in steps)
            )
            if seconds is not None:
                meetings[first] = (steps, seconds)
        left = [m for m in messages if m.sender not in group or root(m.sender) not in meetings]
        return left, list(meetings.values())

    def _collective(self, number: int) -> Collective | None:
        rank = self.rank[number]
        step = self.schedules[rank].steps[number - self.bases[rank]]
        return step if isinstance(step, Collective) else None

    def _slots(self) -> int:
        """How many flows may be under way at a time: those of one step of every stream."""
        flows, most = defaultdict(int), defaultdict(int)
        for step in self.outgoing.owners:
            flows[step] += 1
            most[self.stream[step]] = max(most[self.stream[step]], flows[step])
        return sum(most.values()) + 1


def _ints(column: Sequence[int]) -> Array:
    return np.array(column, np.int64)


def _columns(rows: Sequence[tuple], count: int) -> list[list]:
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(count)]
