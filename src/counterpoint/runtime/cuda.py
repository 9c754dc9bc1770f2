"""Executes a schedule on CUDA: one CUDA stream per stream of the schedule, NCCL for messages.

The host issues the steps in program order and never waits; CUDA events carry the dependencies. Every ordered pair of
ranks has a communicator of its own for every channel, so that each one carries messages one way only, in the order of
the schedule, and no two waits can cross.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import timedelta
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from counterpoint.kernels.kernel import TensorSpec, torch_dtype
from counterpoint.runtime.executor import check_tensor, span_name
from counterpoint.schedule.check import Key, messages
from counterpoint.schedule.schedule import Collective, Compute, Copy, Recv, Schedule, Send, Step
from counterpoint.schedule.timeline import MemoryEvent, Span, Timeline


class CudaExecutor:
    """Runs schedules of one rank on its device. `ranks` maps schedule ranks to global ranks."""

    def __init__(
        self, ranks: Sequence[int], rank: int, device: torch.device, *, timeout: float = 300.0
    ) -> None:
        self.ranks, self.rank, self.device = tuple(ranks), rank, device
        self.timeout = timedelta(seconds=timeout)
        self.group = dist.new_group(list(ranks), timeout=self.timeout, use_local_synchronization=True)
        self.sent: dict[int, int] = defaultdict(int)
        self.received: dict[int, int] = defaultdict(int)
        self.streams: dict[str, torch.cuda.Stream] = {}
        self.pairs: dict[Key, dist.ProcessGroup] = {}

    def run(
        self, schedule: Schedule, inputs: Mapping[str, Tensor], timeline: Timeline | None = None
    ) -> dict[str, Tensor]:
        """Issue a schedule; the outputs are ready on the current stream. See `Executor.run`."""
        for value in schedule.inputs:
            if value.name not in inputs:
                raise ValueError(
                    f"{schedule.name} needs an input {value.name!r}; given are {', '.join(inputs)}"
                )
            check_tensor(value.name, inputs[value.name], value.spec)
        self._connect(schedule)
        run = _Run(self, schedule, inputs, timeline)
        for step in schedule.steps:
            run.issue(step)
        return run.finish(timeline)

    def stream(self, name: str) -> torch.cuda.Stream:
        if name == "compute":
            return torch.cuda.current_stream(self.device)
        if name not in self.streams:
            self.streams[name] = torch.cuda.Stream(self.device, priority=-1)
        return self.streams[name]

    def _connect(self, schedule: Schedule) -> None:
        """Open the communicators that a schedule needs, in one order on all ranks, before anything waits on them."""
        keys = {message.key for step in schedule.steps for message in messages(schedule, step)}
        for key in sorted(keys - self.pairs.keys(), key=lambda k: (min(k[:2]), max(k[:2]), k)):
            source, destination, _ = key
            pair = sorted((self.ranks[source], self.ranks[destination]))
            group = dist.new_group(pair, timeout=self.timeout, backend="nccl", use_local_synchronization=True)
            assert isinstance(group, dist.ProcessGroup)
            token = torch.zeros(1, device=self.device)
            if source == self.rank:
                dist.send(token, self.ranks[destination], group=group)
            else:
                dist.recv(token, self.ranks[source], group=group)
            self.pairs[key] = group


class _Run:
    def __init__(
        self, executor: CudaExecutor, schedule: Schedule, inputs: Mapping[str, Tensor], timeline
    ) -> None:
        self.executor, self.schedule, self.timed = executor, schedule, timeline is not None
        self.values = {v.name: inputs[v.name] for v in schedule.inputs}
        self.readers = dict(schedule.memory.readers)
        begin = self._event(executor.stream("compute"))
        self.ready = dict.fromkeys(self.values, begin)
        self.begin, self.host_begin = begin, perf_counter()
        self.pending: list[dist.Work] = []  # operations of a collective under way
        self.spans: list[tuple[Step, torch.cuda.Event, torch.cuda.Event, int]] = []
        self.memory: list[tuple[torch.cuda.Event, int]] = [(begin, sum(v.nbytes for v in schedule.inputs))]
        self.names: dict[str, list[str]] = {}
        for name, root in schedule.memory.root.items():
            self.names.setdefault(root, []).append(name)
        self.holds: dict[str, list[tuple[set[str], list[torch.cuda.Event]]]] = defaultdict(
            list
        )  # messages of a channel

    def issue(self, step: Step) -> None:
        """Put one step on its stream, behind the events of what it reads."""
        stream = self.executor.stream(step.stream)
        with torch.cuda.stream(stream):
            for name in step.reads:
                stream.wait_event(self.ready[name])
                self.values[name].record_stream(stream)
            if isinstance(step, Recv):
                self._wait_for_slot(step, stream)
            started = self._event(stream)
            made, nbytes = self._do(step)
            stopped = self._event(stream)
        memory = self.schedule.memory
        for value, tensor in zip(step.writes, made, strict=True):
            self.values[value.name], self.ready[value.name] = tensor, stopped
        self._count(stopped, sum(v.nbytes for v in step.writes if memory.root[v.name] == v.name))
        self.spans.append((step, started, stopped, nbytes))
        for root in {memory.root[name] for name in step.reads}:
            self.readers[root] -= 1
            if not self.readers[root] and root not in memory.kept:
                self._free(root, stopped)

    def finish(self, timeline: Timeline | None) -> dict[str, Tensor]:
        current = self.executor.stream("compute")
        for name in self.schedule.outputs.values():
            current.wait_event(self.ready[name])
            self.values[name].record_stream(current)
        if timeline is not None:
            torch.cuda.synchronize(self.executor.device)
            timeline.spans.extend(self._span(*entry) for entry in self.spans)
            rank = self.schedule.rank
            timeline.memory.extend(
                MemoryEvent(rank, self._seconds(event), live) for event, live in self.memory
            )
        return {key: self.values[name] for key, name in self.schedule.outputs.items()}

    def _do(self, step: Step) -> tuple[Sequence[Tensor], int]:
        if isinstance(step, Compute):
            return step.kernel.run(*(self.values[name] for name in step.inputs)), 0
        if isinstance(step, Send):
            return (), self._send(step.inputs, step.to, step.channel, wait=True)
        if isinstance(step, Recv):
            return self._recv([v.spec for v in step.outputs], step.source, step.channel)
        if isinstance(step, Copy):
            target = "cpu" if step.tier == "host" else self.executor.device
            return [self.values[step.input].to(target, copy=True, non_blocking=True)], 0
        assert isinstance(step, Collective)
        made: list[Tensor] = []
        for source, values in step.recvs:
            made += self._recv([v.spec for v in values], source, step.channel, wait=False)[0]
        sent = sum(self._send(names, to, step.channel, wait=False) for to, names in step.sends)
        for work in self.pending:
            work.wait()
        self.pending.clear()
        return made, sent

    def _send(self, names: Sequence[str], to: int, channel: str, *, wait: bool) -> int:
        group, total = self.executor.pairs[self.executor.rank, to, channel], 0
        for name in names:
            value = self.values[name].contiguous()
            total += value.numel() * value.element_size()
            self._started(dist.isend(value, self.executor.ranks[to], group=group), wait)
        self.executor.sent[to] += total
        return total

    def _recv(
        self, specs: Sequence[TensorSpec], source: int, channel: str, *, wait: bool = True
    ) -> tuple[list[Tensor], int]:
        group, made = self.executor.pairs[source, self.executor.rank, channel], []
        for spec in specs:
            value = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=self.executor.device)
            self._started(dist.irecv(value, self.executor.ranks[source], group=group), wait)
            made.append(value)
        total = sum(spec.nbytes for spec in specs)
        self.executor.received[source] += total
        return made, total

    def _started(self, work: dist.Work | None, wait: bool) -> None:
        assert work is not None
        if wait:
            work.wait()  # orders the CUDA stream, not the host
        else:
            self.pending.append(work)

    # ---- buffers -------------------------------------------------------------------------------
    def _wait_for_slot(self, step: Recv, stream: torch.cuda.Stream) -> None:
        """A channel holds `depth` messages at most: the next receive waits until an earlier one has been used up."""
        held = self.holds[step.channel]
        if len(held) >= self.schedule.depth(step.channel):
            names, events = held.pop(0)
            if not names:
                for event in events:
                    stream.wait_event(event)
        held.append(({v.name for v in step.outputs}, []))

    def _free(self, root: str, stopped: torch.cuda.Event) -> None:
        for name in self.names[root]:
            self.values.pop(name, None)
        self._count(stopped, -self.schedule.values[root].nbytes)
        for held in self.holds.values():
            for names, events in held:
                if root in names:
                    names.discard(root)
                    events.append(stopped)

    # ---- records -------------------------------------------------------------------------------
    def _event(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=self.timed)
        event.record(stream)
        return event

    def _count(self, event: torch.cuda.Event, change: int) -> None:
        self.memory.append((event, self.memory[-1][1] + change))

    def _seconds(self, event: torch.cuda.Event) -> float:
        return self.host_begin + self.begin.elapsed_time(event) / 1e3

    def _span(self, step: Step, started: torch.cuda.Event, stopped: torch.cuda.Event, nbytes: int) -> Span:
        schedule, peer, flops, links = self.schedule, None, 0, ()
        if isinstance(step, Send | Recv):
            peer = step.to if isinstance(step, Send) else step.source
        elif isinstance(step, Collective):
            links = tuple((to, schedule.nbytes(names)) for to, names in step.sends)
        elif isinstance(step, Compute):
            flops = step.kernel.work(*(schedule.values[name].spec for name in step.inputs)).flops
        kind = type(step).__name__.lower()
        times = self._seconds(started), self._seconds(stopped)
        return Span(schedule.rank, step.stream, kind, span_name(step), *times, peer, nbytes, flops, links)  # type: ignore[arg-type]
