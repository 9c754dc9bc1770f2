"""Messages between worker processes over the runtime's own transport: one way, both ways at once, collectives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from threading import Event, Thread

import torch
import torch.distributed as dist

from counterpoint.calibration.measurement import Point, Series
from counterpoint.calibration.timing import LEAST, Advance, Effort, spaced
from counterpoint.kernels.kernel import TensorSpec
from counterpoint.runtime.executor import Executor
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.schedule import Schedule

SMALLEST, LARGEST = 2**10, 2**25  # bytes of a message
CHANNEL = "calibrate"
ROUNDS = 4  # of messages there and back in a schedule


def measure_links(
    executor: Executor, effort: Effort, advance: Advance, training: bool = False
) -> dict[str, Series]:
    """Series of messages between ranks 0 and 1, of all ranks exchanging at once, and of collectives.

    training: as a training step meets them, where a small message finds the cores at work; without collectives.
    Collective over the ranks of the executor's transport; all of them return the same.
    """
    bench = _Bench(executor, effort)
    sizes = spaced(SMALLEST, LARGEST, effort.sizes)
    n = bench.world_size
    found: dict[str, Series] = {}

    def series(name: str, cases: Iterable[tuple[int, str, Callable[[], object]]]) -> None:
        points = []
        for size, label, run in cases:
            advance(f"{name}, {label}")
            points.append(bench.point(run, size, label))
        found[name] = Series("bytes", tuple(points))

    series("link/latency", [(1, "1 byte there and back", bench.there_and_back(1, 0, 1))])
    steps, while_busy = 2 * ROUNDS, ", while all ranks compute" if training else ""
    label = f"1 value there and back, {ROUNDS} times, as a schedule{while_busy}"
    with computing() if training else nullcontext():
        series("link/step", [(steps, label, bench.schedule())])
    for source, to in ((0, 1), (1, 0)):
        cases = [
            (k, f"{_size(k)} from rank {source} to {to}, 1 byte back", bench.there_and_back(k, source, to))
            for k in sizes
        ]
        series(f"link/{source}-{to}", cases)
    series("link/exchange", [(k, f"{_size(k)} to the next of {n}", bench.exchange(k)) for k in sizes])
    if training:
        return found
    each = [k for k in sizes if k >= 2**13]
    for kind in ("all_gather", "all_to_all", "reduce_scatter"):
        cases = []
        for size in each:
            part = max(1, size // (n - 1))
            label = f"{_size(part * (n - 1))} sent by each of {n}"
            cases.append((part * (n - 1), label, bench.everyone(part, kind == "all_gather")))
        series(f"collective/{kind}", cases)
    for kind in ("all_reduce", "broadcast"):
        cases = [(size, f"{_size(size)} on each of {n}", bench.library(kind, size)) for size in each]
        series(f"collective/{kind}", cases)
    return found


@contextmanager
def computing() -> Iterator[None]:
    """Computes beside the caller, on a thread of its own."""
    over = Event()

    def work() -> None:
        x, product = torch.randn(256, 256), torch.empty(256, 256)
        while not over.is_set():
            torch.mm(x, x, out=product)

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _Bench:
    """Runs exchanges on all ranks in step; rank 0 decides how often, since the ranks' clocks differ."""

    def __init__(self, executor: Executor, effort: Effort) -> None:
        transport = executor.transport
        assert transport is not None
        self.executor, self.transport, self.effort = executor, transport, effort
        self.rank, self.world_size = transport.rank, len(transport.ranks)

    def point(self, run: Callable[[], object], size: int, label: str) -> Point:
        first = min(self._timed(run) for _ in range(3))
        count = torch.tensor([min(200, max(LEAST, int(self.effort.seconds / first)))])
        dist.broadcast(count, 0)
        times = torch.tensor([self._timed(run) for _ in range(int(count))], dtype=torch.float64)
        dist.all_reduce(times, dist.ReduceOp.MAX)  # it is over when the last rank is done
        return Point.of(size, label, times.tolist())

    def _timed(self, run: Callable[[], object]) -> float:
        """Seconds on this rank. The barrier ends at different moments on the ranks, as steps of a schedule do."""
        dist.barrier()
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    def there_and_back(self, size: int, source: int, to: int) -> Callable[[], object]:
        """A message from one rank to another, and a byte as the answer."""
        t, data, byte = self.transport, _bytes(size), _bytes(1)

        def run() -> None:
            if t.rank == source:
                answer = t.irecv([_room(1)], to, CHANNEL)
                t.wait(t.isend([data], to, CHANNEL))
                t.wait(answer)
            elif t.rank == to:
                t.wait(t.irecv([_room(size)], source, CHANNEL))
                t.wait(t.isend([byte], source, CHANNEL))

        return run

    def schedule(self) -> Callable[[], object]:
        """The smallest message as a step of a schedule: with the executor's own cost per step."""
        schedule = there_and_back(TensorSpec((1,)), ROUNDS, self.rank, self.world_size)
        inputs = {v.name: torch.zeros(1) for v in schedule.inputs}
        return lambda: self.executor.run(schedule, inputs)

    def exchange(self, size: int) -> Callable[[], object]:
        """Every rank sends to the next one and receives from the one before."""
        t, n, data = self.transport, self.world_size, _bytes(size)

        def run() -> None:
            arriving = t.irecv([_room(size)], (t.rank - 1) % n, CHANNEL)
            t.wait(t.isend([data], (t.rank + 1) % n, CHANNEL) + arriving)

        return run

    def everyone(self, part: int, same: bool) -> Callable[[], object]:
        """As the runtime carries out collectives: a message between every pair; the same one for all, or not."""
        t = self.transport
        peers = [r for r in range(self.world_size) if r != self.rank]
        shared = _bytes(part)
        data = {r: shared if same else _bytes(part) for r in peers}

        def run() -> None:
            waiting = [h for r in peers for h in t.irecv([_room(part)], r, CHANNEL)]
            waiting += [h for r in peers for h in t.isend([data[r]], r, CHANNEL)]
            t.wait(waiting)

        return run

    def library(self, kind: str, size: int) -> Callable[[], object]:
        """As training calls them: torch.distributed's own."""
        values = torch.zeros(size // 4)
        if kind == "all_reduce":
            return lambda: dist.all_reduce(values)
        return lambda: dist.broadcast(values, 0)


def there_and_back(spec: TensorSpec, rounds: int, rank: int, world_size: int) -> Schedule:
    """A value goes from rank 0 to rank 1 and back, `rounds` times; the other ranks have nothing to do."""
    b = Builder("there and back", rank, world_size)
    value = b.input("x", spec)
    for _ in range(rounds):
        if rank == 0:
            b.send([value], 1, "there")
            (value,) = b.recv([spec], 1, "back")
        elif rank == 1:
            (value,) = b.recv([spec], 0, "there")
            b.send([value], 0, "back")
    return b.finish({"x": value})


def _bytes(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8)


def _room(size: int) -> torch.Tensor:
    """Memory to receive into, fetched when the message is awaited, as the runtime does."""
    return torch.empty(size, dtype=torch.uint8)


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**20:.3g} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.3g} KiB"
