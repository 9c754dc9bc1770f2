"""Ranks as threads of this process: the real Executor of every rank, over queues instead of gloo.

    results = run_ranks(schedules, inputs)          # one dict of outputs per rank

Messages meet as a schedule says (schedule/schedule.py): a send ends only once the matching receive is posted. Data is
copied at that moment, so a value that is written too early arrives wrong; receive buffers hold NaN until then.
"""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from counterpoint.runtime.errors import PeerFailure
from counterpoint.runtime.executor import Executor
from counterpoint.schedule.schedule import Schedule
from counterpoint.schedule.timeline import Timeline


@dataclass(eq=False, slots=True)
class Operation:
    """One end of the transfer of one tensor."""

    ends: frozenset[int]
    tensor: Tensor
    done: threading.Event = field(default_factory=threading.Event)
    failure: str | None = None

    def finish(self, failure: str | None = None) -> None:
        self.failure = failure
        self.done.set()


class Network:
    """Where the ranks of one process meet. jitter: seconds that a post may be late, at random, to shuffle threads."""

    def __init__(self, *, timeout: float = 30.0, jitter: float = 0.0, seed: int = 0) -> None:
        self.timeout, self.jitter, self.random = timeout, jitter, random.Random(seed)
        self.lock = threading.Lock()
        self.sends: dict[tuple[int, int, str], deque[Operation]] = defaultdict(deque)
        self.receives: dict[tuple[int, int, str], deque[Operation]] = defaultdict(deque)
        self.gone: set[int] = set()

    def post(self, source: int, destination: int, channel: str, tensor: Tensor, *, sends: bool) -> Operation:
        if self.jitter:
            time.sleep(self.random.random() * self.jitter)
        here, there = (self.sends, self.receives) if sends else (self.receives, self.sends)
        mine = Operation(frozenset((source, destination)), tensor)
        with self.lock:
            if mine.ends & self.gone:
                mine.finish(f"rank {min(mine.ends & self.gone)} closed its connections")
            elif there[source, destination, channel]:
                other = there[source, destination, channel].popleft()
                giver, taker = (mine, other) if sends else (other, mine)
                what = (giver.tensor.shape, giver.tensor.dtype), (taker.tensor.shape, taker.tensor.dtype)
                failure = (
                    None
                    if what[0] == what[1]
                    else f"rank {source} sends {what[0]}, {destination} wants {what[1]}"
                )
                if failure is None:
                    taker.tensor.copy_(giver.tensor)
                mine.finish(failure)
                other.finish(failure)
            else:
                here[source, destination, channel].append(mine)
        return mine

    def leave(self, rank: int) -> None:
        with self.lock:
            self.gone.add(rank)
            for pending in (*self.sends.values(), *self.receives.values()):
                for operation in pending:
                    if rank in operation.ends:
                        operation.finish(f"rank {rank} closed its connections")

    def idle(self) -> bool:
        """Nothing is left over from the messages so far."""
        return not any((*self.sends.values(), *self.receives.values()))


class QueueTransport:
    """The interface of counterpoint.runtime.transport.Transport on a `Network`."""

    def __init__(self, network: Network, rank: int) -> None:
        self.network, self.rank, self.timeout, self.group = network, rank, network.timeout, None
        self.sent: dict[int, int] = defaultdict(int)
        self.received: dict[int, int] = defaultdict(int)

    def isend(self, values: Iterable[Tensor], to: int, channel: str) -> list[tuple[Any, Tensor]]:
        handles = []
        for value in values:
            self.sent[to] += value.numel() * value.element_size()
            handles.append((self.network.post(self.rank, to, channel, value, sends=True), value))
        return handles

    def irecv(self, values: Iterable[Tensor], source: int, channel: str) -> list[tuple[Any, Tensor]]:
        handles = []
        for value in values:
            assert value.is_contiguous(), "gloo receives into contiguous memory only"
            if value.is_floating_point():
                value.fill_(torch.nan)
            self.received[source] += value.numel() * value.element_size()
            handles.append((self.network.post(source, self.rank, channel, value, sends=False), value))
        return handles

    def wait(self, handles: Iterable[tuple[Any, Tensor]]) -> None:
        for operation, _ in handles:
            if not operation.done.wait(self.timeout):
                raise RuntimeError(f"rank {self.rank} waited {self.timeout} s: deadlock")
            if operation.failure:
                raise RuntimeError(operation.failure)

    def blame(self, waiting_for: int, step: str, cause: BaseException) -> PeerFailure:
        return PeerFailure(
            f"rank {self.rank} waited for rank {waiting_for} at {step}: {cause}", rank=waiting_for, step=step
        )

    def close(self) -> None:
        self.network.leave(self.rank)


class Ranks:
    """`world_size` ranks in threads; every rank keeps its Executor from run to run."""

    def __init__(self, world_size: int, *, timeout: float = 30.0, jitter: float = 0.0, seed: int = 0) -> None:
        torch.set_num_threads(1)
        self.network = Network(timeout=timeout, jitter=jitter, seed=seed)
        self.transports = [QueueTransport(self.network, rank) for rank in range(world_size)]
        self.executors = [Executor(transport) for transport in self.transports]  # type: ignore[arg-type]
        self.threads = ThreadPoolExecutor(world_size, thread_name_prefix="rank")

    def run(
        self,
        schedules: Sequence[Schedule],
        inputs: Sequence[Mapping[str, Tensor]],
        timelines: Sequence[Timeline] | None = None,
    ) -> list[dict[str, Tensor]]:
        """Execute every rank's schedule at once; outputs by rank. Raises what a rank raised first, or on deadlock."""
        lines = timelines or [None] * len(schedules)
        futures = [
            self.threads.submit(executor.run, schedule, given, line)
            for executor, schedule, given, line in zip(self.executors, schedules, inputs, lines, strict=True)
        ]
        _, late = wait(futures, self.network.timeout + 10)
        for rank in range(len(futures)) if late else ():
            self.network.leave(rank)
        errors = [e for e in (f.exception() for f in futures) if e is not None]
        for error in sorted(errors, key=lambda e: isinstance(e, PeerFailure)):
            raise error
        assert self.network.idle(), "messages were left over"
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the threads."""
        for executor in self.executors:
            if executor._threads is not None:
                executor._threads.shutdown(wait=False)
        self.threads.shutdown(wait=False)


_kept: dict[int, Ranks] = {}


def run_ranks(
    schedules: Sequence[Schedule],
    inputs: Sequence[Mapping[str, Tensor]],
    timelines: Sequence[Timeline] | None = None,
) -> list[dict[str, Tensor]]:
    """Execute the schedules of all ranks in this process, on threads that are kept from call to call."""
    ranks = _kept.pop(len(schedules), None) or Ranks(len(schedules))
    made = ranks.run(schedules, inputs, timelines)
    _kept[len(schedules)] = ranks  # not after a failure: its connections are closed
    return made


def traffic(world_size: int) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], int]]:
    """Bytes that the kept ranks have sent and received so far, by directed link (source, destination)."""
    transports = _kept[world_size].transports if world_size in _kept else []
    sent = {(t.rank, to): n for t in transports for to, n in t.sent.items()}
    received = {(source, t.rank): n for t in transports for source, n in t.received.items()}
    return sent, received
