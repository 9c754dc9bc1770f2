"""Executes a schedule with torch: one thread per stream, values as they become ready.

The compute stream runs on the calling thread. Every other stream has a thread that takes its steps in order, waits
for the values they read, and blocks in the transport; kernels and transport both release the interpreter lock. So any
schedule that is legal (schedule/check.py) makes progress: no stream waits for anything but what its steps need.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from counterpoint.kernels.kernel import TensorSpec, torch_dtype
from counterpoint.runtime.errors import PeerFailure
from counterpoint.runtime.transport import Handle, Transport
from counterpoint.schedule.schedule import Collective, Compute, Copy, Recv, Schedule, Send, Step
from counterpoint.schedule.table import describe, span_name
from counterpoint.schedule.timeline import MemoryEvent, Span, Timeline


class Executor:
    """Runs schedules of one rank, one after the other; keeps its threads between runs."""

    def __init__(self, transport: Transport | None, device: torch.device | str = "cpu") -> None:
        self.transport, self.device = transport, torch.device(device)
        self._threads: ThreadPoolExecutor | None = None

    def run(
        self, schedule: Schedule, inputs: Mapping[str, Tensor], timeline: Timeline | None = None
    ) -> dict[str, Tensor]:
        """Execute a schedule on its inputs by name; returns its outputs by name.

        timeline: spans and live bytes are appended to it. Raises ValueError for an input that is missing or has
        another shape or dtype, PeerFailure when a peer is lost.
        """
        for value in schedule.inputs:
            if value.name not in inputs:
                raise ValueError(
                    f"{schedule.name} needs an input {value.name!r}; given are {', '.join(inputs)}"
                )
            check_tensor(value.name, inputs[value.name], value.spec)
        run = _Run(self, schedule, inputs, timeline)
        others = [stream for stream in schedule.streams if stream != "compute"]
        if others and self._threads is None:
            # Made as streams need them. A stream that found no free thread could be the one all others wait for.
            self._threads = ThreadPoolExecutor(1 << 14, thread_name_prefix="counterpoint")
        # Receives first: gloo announces a posted receive on the connection that a send would fill.
        others.sort(key=lambda stream: not stream.endswith(".recv"))
        futures = [self._threads.submit(run.stream, stream) for stream in others] if self._threads else []
        with torch.autocast(self.device.type, enabled=False):  # kernels compute in the dtypes of the schedule
            run.stream("compute")
        return run.finish(futures)


class _Run:
    """State of one execution."""

    def __init__(
        self, executor: Executor, schedule: Schedule, inputs: Mapping[str, Tensor], timeline: Timeline | None
    ) -> None:
        self.schedule, self.transport, self.device = schedule, executor.transport, executor.device
        self.values: dict[str, Tensor] = {v.name: inputs[v.name] for v in schedule.inputs}
        self.changed = Condition()
        self.readers = dict(schedule.memory.readers)
        self.error: BaseException | None = None
        self.timeline = timeline
        self.spans: list[Span] = []
        self.memory: list[MemoryEvent] = []
        self.live = sum(v.nbytes for v in schedule.inputs)
        copies = (step for step in schedule.steps if isinstance(step, Copy))
        self.host = {step.output.name for step in copies if step.tier == "host"}
        self.names: dict[str, list[str]] = {}  # root -> the names that share its buffer
        for name, root in schedule.memory.root.items():
            self.names.setdefault(root, []).append(name)
        self.inboxes = {
            stream: _Inbox(self, stream) for stream in schedule.streams if stream.endswith(".recv")
        }
        with self.changed:
            self._measure(0)
            for inbox in self.inboxes.values():
                inbox.post()

    # ---- streams -------------------------------------------------------------------------------
    def stream(self, stream: str) -> None:
        """Run the steps of one stream in order; a failure ends the whole run."""
        try:
            for index in self.schedule.streams.get(stream, ()):
                if not self._wait_for(self.schedule.steps[index].reads):
                    return
                self._step(index, self.schedule.steps[index])
        except BaseException as error:
            with self.changed:
                if self.error is None:
                    self.error = error
                self.changed.notify_all()

    def finish(self, futures: list[Future[None]]) -> dict[str, Tensor]:
        if self.error is not None and self.transport is not None:
            self.transport.close()  # wakes the other streams, and the peers
        for future in futures:
            future.result()
        if self.error is not None:
            if self.transport is not None:
                self.transport.close()
            raise self.error
        if self.timeline is not None:
            self.timeline.spans.extend(self.spans)
            self.timeline.memory.extend(self.memory)
        return {key: self.values[name] for key, name in self.schedule.outputs.items()}

    def _step(self, index: int, step: Step) -> None:
        if isinstance(step, Compute):
            started = perf_counter()
            made = step.kernel.run(*(self.values[name] for name in step.inputs))
            self._defined(step, made)
            self._span(step, index, started)
        elif isinstance(step, Send):
            started = perf_counter()
            handles = self._transport.isend(
                (self.values[name] for name in step.inputs), step.to, step.channel
            )
            self._complete(index, step.to, handles)
            self._span(step, index, started, step.to, _nbytes(handles))
        elif isinstance(step, Recv):
            started, handles = self.inboxes[step.stream].next()
            self._complete(index, step.source, handles)
            self._defined(step, [value for _, value in handles], counted=True)
            self._span(step, index, started, step.source, _nbytes(handles))
        elif isinstance(step, Collective):
            self._exchange(index, step)
        else:
            assert isinstance(step, Copy)
            started = perf_counter()
            source = self.values[step.input]
            target = source.to("cpu" if step.tier == "host" else self.device, copy=True)
            self._defined(step, [target])
            self._span(step, index, started)
        self._release(step)

    def _exchange(self, index: int, step: Collective) -> None:
        started = perf_counter()
        arriving = {p: [self._empty(v.spec) for v in values] for p, values in step.recvs}
        waiting = [(p, self._transport.irecv(arriving[p], p, step.channel)) for p, _ in step.recvs]
        links = []
        for p, names in step.sends:
            handles = self._transport.isend((self.values[name] for name in names), p, step.channel)
            waiting.append((p, handles))
            links.append((p, _nbytes(handles)))
        for p, handles in waiting:
            self._complete(index, p, handles)
        self._defined(step, [value for p, _ in step.recvs for value in arriving[p]])
        self._span(step, index, started, None, sum(n for _, n in links), tuple(links))

    @property
    def _transport(self) -> Transport:
        assert self.transport is not None, "a schedule with messages needs a transport"
        return self.transport

    def _complete(self, index: int, peer: int, handles: list[Handle]) -> None:
        try:
            self._transport.wait(handles)
        except RuntimeError as cause:
            if self.error is not None:
                raise
            raise self._transport.blame(peer, describe(self.schedule, index), cause) from None

    # ---- values --------------------------------------------------------------------------------
    def _wait_for(self, names: tuple[str, ...]) -> bool:
        with self.changed:
            self.changed.wait_for(lambda: self.error is not None or all(n in self.values for n in names))
            return self.error is None

    def _defined(self, step: Step, made, counted: bool = False) -> None:
        memory = self.schedule.memory
        with self.changed:
            fresh = [v for v in step.writes if memory.root[v.name] == v.name]
            if not counted:
                self._measure(sum(v.nbytes for v in fresh if v.name not in self.host))
            for value, tensor in zip(step.writes, made, strict=True):
                self.values[value.name] = tensor
            for value in fresh:
                if not self.readers[value.name] and value.name not in memory.kept:
                    self._free(value.name)
            self.changed.notify_all()

    def _release(self, step: Step) -> None:
        """The step has read its values: free buffers that nobody reads any more; receives are posted in their place."""
        memory = self.schedule.memory
        with self.changed:
            for root in {memory.root[name] for name in step.reads}:
                self.readers[root] -= 1
                if not self.readers[root] and root not in memory.kept:
                    self._free(root)

    def _free(self, root: str) -> None:
        for name in self.names[root]:
            self.values.pop(name, None)
        if root not in self.host:
            self._measure(-self.schedule.values[root].nbytes)
        for inbox in self.inboxes.values():
            inbox.freed(root)

    def _empty(self, spec: TensorSpec) -> Tensor:
        return torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=self.device)

    # ---- records -------------------------------------------------------------------------------
    def _measure(self, change: int) -> None:
        self.live += change
        if self.timeline is not None:
            self.memory.append(MemoryEvent(self.schedule.rank, perf_counter(), self.live))

    def _span(
        self, step: Step, index: int, started: float, peer: int | None = None, nbytes: int = 0, links=()
    ) -> None:
        if self.timeline is None:
            return
        flops = 0
        if isinstance(step, Compute):
            flops = step.kernel.work(*(self.schedule.values[name].spec for name in step.inputs)).flops
        kind: Any = type(step).__name__.lower()
        name = span_name(step)
        self.spans.append(
            Span(
                self.schedule.rank,
                step.stream,
                kind,
                name,
                started,
                perf_counter(),
                peer,
                nbytes,
                flops,
                links,
                self.schedule.phase(index),
            )
        )


class _Inbox:
    """The receives of one channel: posted ahead in order, as many as the channel's depth allows."""

    def __init__(self, run: _Run, stream: str) -> None:
        steps = [run.schedule.steps[i] for i in run.schedule.streams[stream]]
        self.run, self.steps = run, deque(step for step in steps if isinstance(step, Recv))
        self.depth = run.schedule.depth(self.steps[0].channel)
        self.posted: deque[tuple[float, list[Handle]]] = deque()
        self.alive: list[set[str]] = []

    def post(self) -> None:
        """Post receives while buffers are free. Called with the run's lock held."""
        while self.steps and len(self.alive) < self.depth and self.run.error is None:
            step = self.steps.popleft()
            buffers = [self.run._empty(v.spec) for v in step.outputs]
            self.alive.append({v.name for v in step.outputs})
            self.run._measure(sum(v.nbytes for v in step.outputs))
            handles = self.run._transport.irecv(buffers, step.source, step.channel)
            self.posted.append((perf_counter(), handles))
            self.run.changed.notify_all()

    def next(self) -> tuple[float, list[Handle]]:
        """The oldest posted receive: when it was posted, and its handles."""
        with self.run.changed:
            self.run.changed.wait_for(lambda: self.posted or self.run.error is not None)
            if self.run.error is not None:
                raise self.run.error
            return self.posted.popleft()

    def freed(self, root: str) -> None:
        """A buffer is free again. Called with the run's lock held."""
        for names in self.alive:
            names.discard(root)
        if any(not names for names in self.alive):
            self.alive = [names for names in self.alive if names]
            self.post()


def kernel_seconds(executor: Executor, schedule: Schedule, inputs: Mapping[str, Tensor]) -> list[float]:
    """Runs a schedule without messages (schedule/alone.py); seconds of every step, which add up to the whole call.

    What the executor spends between steps is dealt out evenly.
    """
    timeline, began = Timeline(), perf_counter()
    with torch.no_grad():
        executor.run(schedule, inputs, timeline)
    passed = perf_counter() - began
    seconds = [0.0] * len(schedule.steps)
    for stream, steps in schedule.streams.items():
        spans = (span for span in timeline.spans if span.stream == stream)
        for index, span in zip(steps, spans, strict=True):
            seconds[index] = span.stop - span.start
    between = max(0.0, passed - sum(seconds)) / max(1, len(seconds))
    return [t + between for t in seconds]


def check_tensor(name: str, tensor: Tensor, spec: TensorSpec) -> None:
    """Raise ValueError unless a tensor has the shape and dtype that a schedule expects."""
    given = TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    if given != spec:
        raise ValueError(f"{name} is {given}, but the schedule expects {spec}")


def _nbytes(handles: list[Handle]) -> int:
    return sum(value.numel() * value.element_size() for _, value in handles)


__all__ = ["Executor", "PeerFailure", "check_tensor", "kernel_seconds", "span_name"]
