"""From schedules and a cluster to a program."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import numpy as np

from counterpoint.cluster.cluster import Cluster
from counterpoint.kernels.kernel import Kernel
from counterpoint.schedule.check import check_messages
from counterpoint.schedule.schedule import Collective, Compute, Recv, Schedule, Send
from counterpoint.simulator.cost import DEVICE, Network, kernel_cost
from counterpoint.simulator.program import COPY, EXCHANGE, RECV, TIMED, Program, lists

Collectives = Literal["direct", "measured"]
Key = tuple[int, int, str]  # source, destination, channel


class Compiler:
    """Collects the arrays of a program, rank by rank. `flops` holds those of every step."""

    def __init__(self, cluster: Cluster, places: Sequence[int]) -> None:
        self.cluster, self.places = cluster, places
        self.network = Network(cluster, places)
        self.rank: list[int] = []
        self.kind: list[int] = []
        self.stream: list[int] = []
        self.following: list[int] = []
        self.seconds: list[float] = []
        self.waits: list[int] = []
        self.flops: list[int] = []
        self.edges: tuple[list[int], list[int]] = ([], [])  # (maker, reader)
        self.reads: tuple[list[int], list[int]] = ([], [])  # (step, buffer)
        self.makes: tuple[list[int], list[int]] = ([], [])
        self.outgoing: tuple[list[int], list[int]] = ([], [])  # (step, message)
        self.incoming: tuple[list[int], list[int]] = ([], [])
        self.first: list[int] = []
        self.depth: list[int] = []
        self.buffers: list[tuple[int, int, bool, int, bool]] = []  # bytes, readers, kept, source, fast
        self.names: list[str] = []  # of buffers
        self.messages: list[
            tuple[int, int, int, float, float, int]
        ] = []  # sender, receiver, bytes, route, ...
        self.meetings: list[tuple[list[int], float]] = []
        self.live: list[int] = []
        self.slots: dict[int, int] = {}  # by stream, most messages that a step of it sends
        self._sent: dict[Key, list[tuple[int, int]]] = defaultdict(list)  # (step, bytes)
        self._received: dict[Key, list[tuple[int, int]]] = defaultdict(list)
        self._costs: dict[tuple, tuple[float, int]] = {}

    def add(self, schedule: Schedule) -> None:
        """The steps of one rank."""
        rank, memory, values = schedule.rank, schedule.memory, schedule.values
        base, device = len(self.rank), self.cluster.device(self.places[rank])
        self._streams(schedule, base)
        maker: dict[str, int] = {}
        tier = {v.name: DEVICE for v in schedule.inputs}
        buffer = {v.name: self._buffer(schedule, v.name, -1, DEVICE) for v in schedule.inputs}
        for step_number, step in enumerate(schedule.steps, base):
            reads = step.reads
            sources = {maker[name] for name in reads if name in maker}
            self.waits[step_number] += len(sources)
            for source in sources:
                self.edges[0].append(source)
                self.edges[1].append(step_number)
            for root in dict.fromkeys(memory.root[name] for name in reads):
                self.reads[0].append(step_number)
                self.reads[1].append(buffer[root])
            seconds, flops, kind, goes = 0.0, 0, EXCHANGE, DEVICE
            if isinstance(step, Compute):
                kind = TIMED
                seconds, flops = self._kernel(device, step.kernel, tuple(values[name].spec for name in reads))
                goes = tier[reads[0]] if reads and step.kernel.aliases else DEVICE
            elif isinstance(step, Send):
                self._send(rank, step_number, step.to, step.channel, schedule.nbytes(reads))
            elif isinstance(step, Recv):
                kind = RECV
                size = sum(v.nbytes for v in step.outputs)
                self._received[step.source, rank, step.channel].append((step_number, size))
            elif isinstance(step, Collective):
                for to, names in step.sends:
                    self._send(rank, step_number, to, step.channel, schedule.nbytes(names))
                for source, received in step.recvs:
                    size = sum(v.nbytes for v in received)
                    self._received[source, rank, step.channel].append((step_number, size))
            else:
                kind, goes = COPY, DEVICE if step.tier == device.memory[0].name else step.tier
                nbytes = step.output.nbytes
                route, latency, limit = self.network.copy(rank, tier[step.input], goes, nbytes)
                self._message(step_number, -1, nbytes, latency, limit, route)
            self.kind[step_number], self.seconds[step_number], self.flops[step_number] = kind, seconds, flops
            for value in step.writes:
                maker[value.name], tier[value.name] = step_number, goes
                if memory.root[value.name] == value.name:
                    source = step_number if kind == RECV else -1
                    buffer[value.name] = self._buffer(schedule, value.name, source, goes)
                    self.makes[0].append(step_number)
                    self.makes[1].append(buffer[value.name])
        self.live.append(sum(v.nbytes for v in schedule.inputs))

    def finish(self, schedules: Sequence[Schedule], collectives: Collectives) -> Program:
        """The program of all ranks that were added."""
        self._match(schedules)
        if collectives == "measured":
            self._meet(schedules)
        n = len(self.rank)
        sender, receiver, nbytes, latency, limit, route = _columns(self.messages, 6)
        size, readers, kept, source, fast = _columns(self.buffers, 5)
        at, steps = lists(
            [i for i, m in enumerate(self.meetings) for _ in m[0]],
            [s for m in self.meetings for s in m[0]],
            len(self.meetings),
        )
        network = self.network
        return Program(
            *_ints(self.rank, self.kind, self.stream, self.following), np.array(self.seconds), *_ints(self.waits),
            *lists(*self.edges, n), *lists(*self.reads, n), *lists(*self.makes, n),
            *lists(*self.outgoing, n), *lists(*self.incoming, n),
            *_ints(self.first, self.depth),
            *_ints(size, readers), np.array(kept, np.bool_), *_ints(source), np.array(fast, np.bool_),
            *_ints(sender, receiver, nbytes), np.array(latency, np.float64), np.array(limit, np.float64), *_ints(route),
            *_ints(network.at, network.resources), np.ones(len(network.resources)), np.array(network.capacity, np.float64),
            at, steps, *_ints([len(m[0]) for m in self.meetings]), np.array([m[1] for m in self.meetings], np.float64),
            *_ints(self.live, [self.cluster.device(place).memory_bytes for place in self.places]),
            sum(self.slots.values()) + 1,
        )  # fmt: skip

    def _streams(self, schedule: Schedule, base: int) -> None:
        n = len(schedule.steps)
        self.rank += [schedule.rank] * n
        for column in (self.kind, self.stream, self.waits, self.flops):
            column += [0] * n
        self.following += [-1] * n
        self.seconds += [0.0] * n
        for indices in schedule.streams.values():
            number, step = len(self.first), schedule.steps[indices[0]]
            self.first.append(base + indices[0])
            self.depth.append(schedule.depth(step.channel) if isinstance(step, Recv) else 0)
            for i, after in zip(indices, (*indices[1:], None), strict=True):
                self.stream[base + i] = number
                if after is not None:
                    self.following[base + i] = base + after
                    self.waits[base + after] = 1

    def _buffer(self, schedule: Schedule, name: str, source: int, tier: str) -> int:
        memory = schedule.memory
        size, readers = schedule.values[name].nbytes, memory.readers[name]
        self.buffers.append((size, readers, name in memory.kept, source, tier == DEVICE))
        self.names.append(name)
        return len(self.buffers) - 1

    def _kernel(self, device, kernel: Kernel, specs: tuple) -> tuple[float, int]:
        key = (device.name, kernel, specs)
        if key not in self._costs:
            self._costs[key] = kernel_cost(device, kernel, specs)
        return self._costs[key]

    def _send(self, rank: int, step: int, to: int, channel: str, nbytes: int) -> None:
        self._sent[rank, to, channel].append((step, nbytes))

    def _message(
        self, sender: int, receiver: int, nbytes: int, latency: float, limit: float, route: int
    ) -> None:
        self.outgoing[0].append(sender)
        self.outgoing[1].append(len(self.messages))
        if receiver >= 0:
            self.incoming[0].append(receiver)
            self.incoming[1].append(len(self.messages))
        self.messages.append((sender, receiver, nbytes, latency, limit, route))

    def _match(self, schedules: Sequence[Schedule]) -> None:
        """The n-th message from one rank to another on a channel meets the n-th receive."""
        sent, received = self._sent, self._received
        if any(
            [n for _, n in sent.get(key, ())] != [n for _, n in received.get(key, ())]
            for key in sent.keys() | received.keys()
        ):
            check_messages(schedules)
            raise AssertionError("messages differ in size, yet the check accepts them")
        for (source, destination, _), items in sent.items():
            for (sender, nbytes), (receiver, _) in zip(items, received[source, destination, _], strict=True):
                route, latency, limit = self.network.message(source, destination, nbytes)
                self._message(sender, receiver, nbytes, latency, limit, route)
        each: dict[int, int] = defaultdict(int)
        for sender in self.outgoing[0]:
            each[sender] += 1
        for sender, count in each.items():
            stream = self.stream[sender]
            self.slots[stream] = max(self.slots.get(stream, 0), count)

    def _meet(self, schedules: Sequence[Schedule]) -> None:
        """Collectives whose time the cluster has measured happen at once, when all who exchange messages have come."""


def _ints(*columns: Sequence[int]) -> tuple[np.ndarray, ...]:
    return tuple(np.array(column, np.int64) for column in columns)


def _columns(rows: Sequence[tuple], count: int) -> list[list]:
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(count)]
