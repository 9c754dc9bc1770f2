"""From schedules and a cluster to a program."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from counterpoint.cluster.cluster import Cluster
from counterpoint.schedule.check import check_messages
from counterpoint.schedule.schedule import Collective, Compute, Recv, Schedule, Send
from counterpoint.simulator.cost import Cost, Costs, KernelCosts
from counterpoint.simulator.fold import Symmetry
from counterpoint.simulator.meetings import Meeting, Message, meet
from counterpoint.simulator.program import COPY, EXCHANGE, MEETING, RECV, SEND, TIMED, Array, Program, lists
from counterpoint.simulator.routes import DEVICE, Asymmetric, Routes

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


class Compiler:
    """Collects the arrays of a program, schedule by schedule.

    After `finish`, `flops` and `wire` hold the work and the bytes on the wire of every step, `names` those of buffers.
    """

    def __init__(
        self, cluster: Cluster, places: Sequence[int], symmetry: Symmetry, costs: Costs = KernelCosts
    ) -> None:
        self.costs = costs
        self.cluster, self.places, self.symmetry = cluster, places, symmetry
        self.joint = symmetry  # what schedules and cluster have in common; known after `finish`
        self.turns: list[tuple[int, ...]] = []  # from the ranks of the schedules to all that the program has
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
        self.first: list[int] = []
        self.depth: list[int] = []
        self.names: list[str] = []
        self._buffers: list[tuple[int, int, bool, int, bool]] = []  # bytes, readers, kept, source, fast
        self._copied: list[tuple[int, int, int, str, str]] = []  # step, bytes, rank, tiers from and to
        self._sent: dict[Key, list[End]] = defaultdict(list)
        self._received: dict[Key, list[End]] = defaultdict(list)
        self._destination: dict[Key, int] = {}
        self._ends: dict[
            tuple[int, int], tuple[int, int]
        ] = {}  # by sender and receiver: the first two of a key
        self._costs: dict[str, Cost] = {}  # by name of the device

    def add(self, schedule: Schedule) -> None:
        """The steps of one rank."""
        memory, values = schedule.memory, schedule.values
        base, device = len(self.rank), self.cluster.device(self.places[schedule.rank])
        self._add_streams(schedule, base)
        cost = self._costs.setdefault(device.name, self.costs(device))
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
                specs = [values[name].spec for name in reads]
                self.seconds[number], self.flops[number] = cost(step.kernel, specs)
                where = tier[reads[0]] if reads and step.kernel.aliases else DEVICE
            elif isinstance(step, Send):
                kind = SEND
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
                self._copied.append((number, step.output.nbytes, schedule.rank, tier[step.input], where))
            self.kind[number] = kind
            for value in step.writes:
                maker[value.name], tier[value.name] = number, where
                if memory.root[value.name] == value.name:
                    allocate(value.name, number if kind == RECV else -1, where)
                    self.makes.add(number, buffer[value.name])

    def finish(self, collectives: Collectives) -> Program:
        """The program of all schedules that were added. Raises ScheduleError for a message without counterpart.

        Where the cluster has less symmetry than the schedules, the program holds a copy of the schedules for every
        rank that the cluster tells apart.
        """
        messages = self._match()
        routes = self._routes({(m.source, m.destination) for m in messages})
        messages = self._turned(messages)
        meetings: list[Meeting] = []
        if collectives == "measured":
            messages, meetings = meet(messages, self._collective, self.cluster, self.places)
        flows, outgoing, incoming = [], Lists(), Lists()
        for m in messages:
            incoming.add(m.receiver, len(flows))
            outgoing.add(m.sender, len(flows))
            flows.append((m.sender, m.receiver, m.nbytes, *routes.message(m.source, m.destination, m.nbytes)))
        for c, turn in enumerate(self.turns):
            for step, nbytes, rank, source, target in self._copied:
                outgoing.add(step + c * len(self.rank), len(flows))
                way = routes.copy(self.symmetry.turned(rank, turn), source, target, nbytes)
                flows.append((step + c * len(self.rank), -1, nbytes, *way))
        slots = self._slots(outgoing)
        for i, (members, _) in enumerate(meetings):
            for step in members:
                outgoing.add(step, i)
        return self._program(routes, flows, outgoing, incoming, meetings, slots)

    def place(self, index: int) -> tuple[int, int, int]:
        """(schedule, rank, first step) of the rank with this index in the program."""
        turn, schedule = divmod(index, len(self.schedules))
        rank = self.symmetry.turned(self.schedules[schedule].rank, self.turns[turn])
        return schedule, rank, self.bases[schedule] + turn * len(self.rank)

    def _routes(self, pairs: set[tuple[int, int]]) -> Routes:
        """Routes under the strongest symmetry that schedules and cluster share; sets `joint` and `turns`."""
        ordered, ways = sorted(pairs), {}
        for joint in self.symmetry.weaker():
            turns, tried = self.symmetry.copies(joint), -1
            try:
                routes = Routes(self.cluster, self.places, joint, ways)
                for source, destination in ordered:
                    tried += 1
                    for turn in turns:
                        routes.pair(
                            self.symmetry.turned(source, turn), self.symmetry.turned(destination, turn)
                        )
                routes.arrays()
            except Asymmetric:
                ordered = [
                    ordered[tried],
                    *ordered[:tried],
                    *ordered[tried + 1 :],
                ]  # the next one may fail there too
                continue
            self.joint, self.turns = joint, turns
            return routes
        raise AssertionError("a rank that stands only for itself fits every cluster")

    def _turned(self, messages: list[Message]) -> list[Message]:
        """The messages of all copies of the schedules."""
        if len(self.turns) == 1:
            return messages
        number = {turn: i for i, turn in enumerate(self.turns)}
        steps, turned = len(self.rank), []
        ends: dict[tuple[int, int, int], tuple[int, int, int]] = {}
        for c, turn in enumerate(self.turns):
            for m in messages:
                key = (m.source, m.destination, c)
                if key not in ends:
                    to = self.symmetry.turned(m.destination, turn)
                    other = number[self.symmetry.copy_of(self.joint.representative(to))]
                    ends[key] = (self.symmetry.turned(m.source, turn), to, other)
                source, to, other = ends[key]
                turned.append(Message(m.sender + c * steps, m.receiver + other * steps, m.nbytes, source, to))
        return turned

    def _program(
        self,
        routes: Routes,
        flows: list[tuple],
        outgoing: Lists,
        incoming: Lists,
        meetings: list[Meeting],
        slots: int,
    ) -> Program:
        copies, n = len(self.turns), len(self.rank)

        def tiled(column: Sequence, offset: int = 0) -> Array:
            """The column for every copy; what is not negative counts from that copy's `offset` on."""
            whole = np.tile(np.array(column, np.int64), copies)
            whole[whole >= 0] += np.repeat(np.arange(copies) * offset, len(column))[whole >= 0]
            return whole

        def many(each: Lists, offset: int) -> tuple[Array, Array]:
            return lists(tiled(each.owners, n), tiled(each.items, offset), n * copies)

        size, readers, kept, filled, fast = _columns(self._buffers, 5)
        sender, receiver, nbytes, route, latency, limit = _columns(flows, 6)
        successors_at, successors = many(self.successors, n)
        reads_at, reads = many(self.reads, len(size))
        makes_at, makes = many(self.makes, len(size))
        outgoing_at, outgoing_items = lists(outgoing.owners, outgoing.items, n * copies)
        incoming_at, incoming_items = lists(incoming.owners, incoming.items, n * copies)
        route_at, route_resources, route_weights, capacity = routes.arrays()
        members = [(i, step) for i, (steps, _) in enumerate(meetings) for step in steps]
        meeting_at, meeting_steps = lists(
            [i for i, _ in members], [step for _, step in members], len(meetings)
        )
        kind = tiled(self.kind)
        kind[meeting_steps] = MEETING
        ranks = [self.place(i)[1] for i in range(copies * len(self.schedules))]
        return Program(
            rank=tiled(self.rank, len(self.schedules)), kind=kind, stream=tiled(self.stream, len(self.first)),
            following=tiled(self.following, n), seconds=np.tile(np.array(self.seconds, np.float64), copies),
            waits=tiled(self.waits), successors_at=successors_at, successors=successors,
            reads_at=reads_at, reads=reads, makes_at=makes_at, makes=makes,
            outgoing_at=outgoing_at, outgoing=outgoing_items, incoming_at=incoming_at, incoming=incoming_items,
            first=tiled(self.first, n), depth=tiled(self.depth),
            buffer_bytes=tiled(size), buffer_readers=tiled(readers), buffer_kept=tiled(kept).astype(np.bool_),
            buffer_source=tiled(filled, n), buffer_fast=tiled(fast).astype(np.bool_),
            message_sender=_ints(sender), message_receiver=_ints(receiver), message_bytes=_ints(nbytes),
            message_latency=np.array(latency, np.float64), message_limit=np.array(limit, np.float64),
            message_route=_ints(route), route_at=route_at, route_resources=route_resources,
            route_weights=route_weights, capacity=capacity, meeting_at=meeting_at, meeting_steps=meeting_steps,
            meeting_members=np.diff(meeting_at), meeting_seconds=np.array([t for _, t in meetings], np.float64),
            live=tiled([sum(v.nbytes for v in s.inputs) for s in self.schedules]),
            limit=_ints([self.cluster.device(self.places[rank]).memory_bytes for rank in ranks]), slots=slots,
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

    def _send(self, step: int, rank: int, to: int, channel: str, nbytes: int) -> None:
        if (rank, to) not in self._ends:
            self._ends[rank, to] = self.symmetry.seen_from(to, rank), self.symmetry.representative(to)
        key = (*self._ends[rank, to], channel)
        self._sent[key].append((step, nbytes))
        self._destination[key] = to
        self.wire[step] += nbytes

    def _receive(self, step: int, rank: int, source: int, channel: str, nbytes: int) -> None:
        self._received[source, rank, channel].append((step, nbytes))

    def _match(self) -> list[Message]:
        """The n-th message from one rank to another on a channel meets the n-th receive."""
        messages = []
        for key in self._sent.keys() | self._received.keys():
            sent, received = self._sent.get(key, []), self._received.get(key, [])
            if [n for _, n in sent] != [n for _, n in received]:
                if not self.symmetry.folded:
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

    def _collective(self, number: int) -> Collective | None:
        number %= len(self.rank)
        rank = self.rank[number]
        step = self.schedules[rank].steps[number - self.bases[rank]]
        return step if isinstance(step, Collective) else None

    def _slots(self, outgoing: Lists) -> int:
        """How many flows may be under way at a time: those of one step of every stream."""
        flows, most = defaultdict(int), defaultdict(int)
        for step in outgoing.owners:
            flows[step] += 1
            copy, number = divmod(step, len(self.rank))
            stream = (copy, self.stream[number])
            most[stream] = max(most[stream], flows[step])
        return sum(most.values()) + 1


def _ints(column: Sequence[int]) -> Array:
    return np.array(column, np.int64)


def _columns(rows: Sequence[tuple], count: int) -> list[list]:
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(count)]
