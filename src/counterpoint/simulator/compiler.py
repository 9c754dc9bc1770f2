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
from counterpoint.schedule.schedule import Collective, Compute, Recv, Schedule, Send, Value
from counterpoint.simulator.cost import Cost, Costs, KernelCosts
from counterpoint.simulator.fold import Symmetry
from counterpoint.simulator.meetings import Meeting, Message, meet
from counterpoint.simulator.program import COPY, EXCHANGE, MEETING, RECV, SEND, TIMED, Array, Program, lists
from counterpoint.simulator.routes import DEVICE, Asymmetric, Routes

Collectives = Literal["direct", "measured"]
Key = tuple[int, int, str]  # source as the receiver sees it, the rank that stands for the receiver, channel
End = tuple[int, int]  # step, bytes
NONE: dict[int, int] = {}


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
        self.flops: list[int] = []
        self.wire: list[int] = []
        self.names: list[str] = []
        self._steps: list[tuple[int, int, float, int, int]] = []  # stream, kind, seconds, flops, wire
        self._depth: list[int] = []  # of streams
        self._readers: list[int] = []  # what is read: by which step, made by which, from which buffer
        self._makers: list[int] = []
        self._read: list[int] = []
        # of buffers: name, bytes, the step that makes it and the receive that fills it or -1, in fast memory
        self._buffers: list[tuple[str, int, int, int, bool]] = []
        self._kept: list[int] = []  # buffers that are never freed
        self._copied: list[tuple[int, int, int, str, str]] = []  # step, bytes, rank, tiers from and to
        self._sent: dict[Key, list[End]] = defaultdict(list)
        self._received: dict[Key, list[End]] = defaultdict(list)
        self._destination: dict[Key, int] = {}
        self._costs: dict[str, Cost] = {}  # by name of the device

    def add(self, schedule: Schedule) -> None:
        """The steps of one rank."""
        device = self.cluster.device(self.places[schedule.rank])
        if device.name not in self._costs:
            self._costs[device.name] = self.costs(device)
        cost, main, base = self._costs[device.name], device.memory[0].name, len(self.rank)
        self.rank += [len(self.schedules)] * len(schedule.steps)
        self.schedules.append(schedule)
        self.bases.append(base)
        # A value: the step that makes it, the buffer it lives in, its bytes, its spec, the tier of memory.
        known: dict[str, tuple[int, int, int, TensorSpec, str]] = {}
        streams: dict[str, int] = {}
        outgoing: dict[tuple[int, str], list[End]] = {}
        incoming: dict[tuple[int, str], list[End]] = {}
        readers, makers, read, buffers = self._readers, self._makers, self._read, self._buffers

        def send(number: int, to: int, channel: str, values: list[tuple]) -> int:
            nbytes = sum([value[2] for value in values])
            if (to, channel) not in outgoing:
                outgoing[to, channel] = self._sent_to(schedule.rank, to, channel)
            outgoing[to, channel].append((number, nbytes))
            return nbytes

        def receive(number: int, source: int, channel: str, outputs: Sequence[Value]) -> int:
            nbytes = sum([value.spec.nbytes for value in outputs])
            if (source, channel) not in incoming:
                incoming[source, channel] = self._received[source, schedule.rank, channel]
            incoming[source, channel].append((number, nbytes))
            return nbytes

        for value in schedule.inputs:
            nbytes = value.spec.nbytes
            known[value.name] = -1, len(buffers), nbytes, value.spec, DEVICE
            buffers.append((value.name, nbytes, -1, -1, True))
        for number, step in enumerate(schedule.steps, base):
            values = [known[name] for name in step.reads]
            for value in values:
                readers.append(number)
                makers.append(value[0])
                read.append(value[1])
            made, where, source, aliases, seconds, flops, wire = step.writes, DEVICE, -1, NONE, 0.0, 0, 0
            if isinstance(step, Compute):
                kind, aliases = TIMED, step.kernel.aliases
                seconds, flops = cost(step.kernel, [value[3] for value in values])
                if aliases and values:
                    where = values[0][4]
            elif isinstance(step, Send):
                kind, wire = SEND, send(number, step.to, step.channel, values)
            elif isinstance(step, Recv):
                kind, source = RECV, number
                wire = receive(number, step.source, step.channel, made)
            elif isinstance(step, Collective):
                kind = EXCHANGE
                for to, names in step.sends:
                    wire += send(number, to, step.channel, [known[name] for name in names])
                for peer, outputs in step.recvs:
                    receive(number, peer, step.channel, outputs)
            else:
                kind, where = COPY, DEVICE if step.tier == main else step.tier
                self._copied.append((number, step.output.nbytes, schedule.rank, values[0][4], where))
            stream = streams.get(step.stream)
            if stream is None:
                stream = streams[step.stream] = len(self._depth)
                self._depth.append(schedule.depth(step.channel) if isinstance(step, Recv) else 0)
            self._steps.append((stream, kind, seconds, flops, wire))
            for i, value in enumerate(made):
                nbytes = value.spec.nbytes
                if i in aliases:
                    buffer = values[aliases[i]][1]
                else:
                    buffer = len(buffers)
                    buffers.append((value.name, nbytes, number, source, where == DEVICE))
                known[value.name] = number, buffer, nbytes, value.spec, where
        held = (*(value.name for value in schedule.inputs), *schedule.outputs.values())
        self._kept += [known[name][1] for name in held]

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
        streams, kinds, seconds, self.flops, self.wire = _columns(self._steps, 5)
        slots = self._slots(outgoing, streams)
        for i, (members, _) in enumerate(meetings):
            for step in members:
                outgoing.add(step, i)
        timed = _ints(streams), _ints(kinds), np.array(seconds, np.float64)
        return self._program(timed, routes, flows, outgoing, incoming, meetings, slots)

    def place(self, index: int) -> tuple[int, int, int]:
        """(schedule, rank, first step) of the rank with this index in the program."""
        turn, schedule = divmod(index, len(self.schedules))
        rank = self.symmetry.turned(self.schedules[schedule].rank, self.turns[turn])
        return schedule, rank, self.bases[schedule] + turn * len(self.rank)

    def _routes(self, pairs: set[tuple[int, int]]) -> Routes:
        """Routes under the strongest symmetry that schedules and cluster share; sets `joint` and `turns`."""
        ordered = sorted(pairs)
        for joint in self.symmetry.weaker():
            turns, tried = self.symmetry.copies(joint), -1
            try:
                routes = Routes(self.cluster, self.places, joint)
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
        steps: tuple[Array, Array, Array],
        routes: Routes,
        flows: list[tuple],
        outgoing: Lists,
        incoming: Lists,
        meetings: list[Meeting],
        slots: int,
    ) -> Program:
        copies, n = len(self.turns), len(self.rank)

        def tiled(column: Sequence | Array, offset: int = 0) -> Array:
            """The column for every copy; what is not negative counts from that copy's `offset` on."""
            if copies == 1:
                return np.array(column, np.int64)
            whole = np.tile(np.array(column, np.int64), copies)
            whole[whole >= 0] += np.repeat(np.arange(copies) * offset, len(column))[whole >= 0]
            return whole

        def many(owners: Array, items: Array, offset: int) -> tuple[Array, Array]:
            return lists(tiled(owners, n), tiled(items, offset), n * copies)

        sender, receiver, nbytes, route, latency, limit = _columns(flows, 6)
        stream, kind, seconds = steps
        self.names, size, maker, filled, fast = _columns(self._buffers, 5)
        kept, made = np.zeros(len(size), np.int64), np.flatnonzero(_ints(maker) >= 0)
        kept[self._kept] = 1
        following, first, waits = self._in_order(stream)
        successors_at, successors = many(*self._successors(waits), n)
        reader, read = self._reads()
        reads_at, reads = many(reader, read, len(size))
        makes_at, makes = many(_ints(maker)[made], made, len(size))
        outgoing_at, outgoing_items = lists(outgoing.owners, outgoing.items, n * copies)
        incoming_at, incoming_items = lists(incoming.owners, incoming.items, n * copies)
        route_at, route_resources, route_weights, capacity = routes.arrays()
        members = [(i, step) for i, (steps, _) in enumerate(meetings) for step in steps]
        meeting_at, meeting_steps = lists(
            [i for i, _ in members], [step for _, step in members], len(meetings)
        )
        kind = tiled(kind)
        kind[meeting_steps] = MEETING
        ranks = [self.place(i)[1] for i in range(copies * len(self.schedules))]
        return Program(
            rank=tiled(self.rank, len(self.schedules)), kind=kind, stream=tiled(stream, len(first)),
            following=tiled(following, n), seconds=np.tile(seconds, copies),
            waits=tiled(waits), successors_at=successors_at, successors=successors,
            reads_at=reads_at, reads=reads, makes_at=makes_at, makes=makes,
            outgoing_at=outgoing_at, outgoing=outgoing_items, incoming_at=incoming_at, incoming=incoming_items,
            first=tiled(first, n), depth=tiled(self._depth),
            buffer_bytes=tiled(size), buffer_readers=tiled(np.bincount(read, minlength=len(size))),
            buffer_kept=tiled(kept).astype(np.bool_), buffer_source=tiled(filled, n),
            buffer_fast=tiled(fast).astype(np.bool_),
            message_sender=_ints(sender), message_receiver=_ints(receiver), message_bytes=_ints(nbytes),
            message_latency=np.array(latency, np.float64), message_limit=np.array(limit, np.float64),
            message_route=_ints(route), route_at=route_at, route_resources=route_resources,
            route_weights=route_weights, capacity=capacity, meeting_at=meeting_at, meeting_steps=meeting_steps,
            meeting_members=np.diff(meeting_at), meeting_seconds=np.array([t for _, t in meetings], np.float64),
            live=tiled([sum(v.nbytes for v in s.inputs) for s in self.schedules]),
            limit=_ints([self.cluster.device(self.places[rank]).memory_bytes for rank in ranks]), slots=slots,
        )  # fmt: skip

    def _in_order(self, stream: Array) -> tuple[Array, Array, Array]:
        """Of steps the next one of their stream or -1; of streams the first step; of steps: does one come before."""
        order = np.argsort(stream, kind="stable")
        same = stream[order[1:]] == stream[order[:-1]]
        following, waits = np.full(stream.size, -1), np.zeros(stream.size, np.int64)
        following[order[:-1][same]] = order[1:][same]
        waits[order[1:][same]] = 1
        return following, order[np.append(True, ~same)[: order.size]], waits

    def _successors(self, waits: Array) -> tuple[Array, Array]:
        """(maker, reader) of values, each pair once; adds to what the readers wait for."""
        maker, reader = _ints(self._makers), _ints(self._readers)
        pairs = np.unique((maker * len(self.rank) + reader)[maker >= 0])
        makers, readers = np.divmod(pairs, max(1, len(self.rank)))
        waits += np.bincount(readers, minlength=waits.size)
        return makers, readers

    def _reads(self) -> tuple[Array, Array]:
        """(step, buffer), each pair once, in the order of the reads."""
        reader, read = _ints(self._readers), _ints(self._read)
        _, kept = np.unique(reader * max(1, len(self._buffers)) + read, return_index=True)
        kept.sort()
        return reader[kept], read[kept]

    def _sent_to(self, rank: int, to: int, channel: str) -> list[End]:
        """What a rank sends to another on a channel, as the rank that stands for the receiver sees it."""
        key = (self.symmetry.seen_from(to, rank), self.symmetry.representative(to), channel)
        self._destination[key] = to
        return self._sent[key]

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

    def _slots(self, outgoing: Lists, streams: Sequence[int]) -> int:
        """How many flows may be under way at a time: those of one step of every stream."""
        flows, most = defaultdict(int), defaultdict(int)
        for step in outgoing.owners:
            flows[step] += 1
            copy, number = divmod(step, len(self.rank))
            stream = (copy, streams[number])
            most[stream] = max(most[stream], flows[step])
        return sum(most.values()) + 1


def _ints(column: Sequence[int]) -> Array:
    return np.array(column, np.int64)


def _columns(rows: Sequence[tuple], count: int) -> list[list]:
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(count)]
