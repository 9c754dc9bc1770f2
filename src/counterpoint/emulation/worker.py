"""One rank of a scale model: a process in its namespace that runs its schedules for real."""

from __future__ import annotations

import json
import pickle
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from counterpoint.emulation.namespaces import enter
from counterpoint.emulation.programs import Programs
from counterpoint.strategies.sequence.attention import AttentionProblem
from counterpoint.strategies.sequence.linear import LinearProblem

if TYPE_CHECKING:
    from torch import Tensor

    from counterpoint.runtime.executor import Executor
    from counterpoint.runtime.transport import Transport
    from counterpoint.schedule.schedule import Schedule

Pass = Literal["forward", "backward"]
PING = 40  # messages each way to measure the latency of a pair


@dataclass(frozen=True, slots=True)
class Run:
    """A problem that the ranks of a scale model run, and the files that they leave.

    seconds: for every pass and rank how long each step is held; empty: kernels compute. repetitions: measured after
    one run that is not.
    """

    number: int
    problem: AttentionProblem | LinearProblem
    passes: tuple[Pass, ...]
    seconds: dict[Pass, list[list[float]]]
    repetitions: int
    directory: str

    @property
    def held(self) -> bool:
        return bool(self.seconds)

    def schedule(self, which: Pass, rank: int) -> Schedule:
        from counterpoint.emulation.held import hold

        schedule = self.problem.schedule(which, rank)
        return hold(schedule, self.seconds[which][rank]) if self.held else schedule

    def timeline_file(self, which: Pass, repetition: int, rank: int) -> Path:
        return Path(self.directory, f"{self.number}-{which}-{repetition}-{rank}.json")

    def seconds_file(self, which: Pass, rank: int) -> Path:
        return Path(self.directory, f"{self.number}-{which}-seconds-{rank}.json")

    def results_file(self, rank: int) -> Path:
        return Path(self.directory, f"{self.number}-results-{rank}.pt")


@dataclass(frozen=True, slots=True)
class Job:
    """What the ranks of a scale model do one after the other, as the parent writes it down for them.

    namespaces: a file for every rank's.
    """

    runs: tuple[Run | Programs, ...]
    namespaces: tuple[str, ...]
    directory: str
    timeout: float

    @property
    def world_size(self) -> int:
        return len(self.namespaces)

    def write(self) -> Path:
        path = Path(self.directory, "job")
        path.write_bytes(pickle.dumps(self))
        return path

    @staticmethod
    def read(path: Path) -> Job:
        return pickle.loads(path.read_bytes())

    def latency_file(self, rank: int) -> Path:
        return Path(self.directory, f"latency-{rank}.json")


def work(job: Job, rank: int) -> None:
    """Do a rank's part of a job; must be called before anything has started threads."""
    enter(job.namespaces[rank])
    import torch
    import torch.distributed as dist
    from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

    from counterpoint.runtime.executor import Executor
    from counterpoint.runtime.transport import Transport

    torch.set_num_threads(1)
    store = FileStore(str(Path(job.directory, "store")), job.world_size)
    patience = timedelta(seconds=job.timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=job.world_size, timeout=patience)
    transport = Transport(range(job.world_size), rank, timeout=job.timeout)
    job.latency_file(rank).write_text(json.dumps(_latencies(transport)))
    executor = Executor(transport)
    for run in job.runs:
        if isinstance(run, Run):
            _carry_out(run, rank, executor, transport)
        else:
            run.carry_out(rank, executor, lambda: start_together(transport))
    dist.barrier()
    dist.destroy_process_group()


def _carry_out(run: Run, rank: int, executor: Executor, transport: Transport) -> None:
    import torch

    from counterpoint.emulation.real import Alone
    from counterpoint.schedule.timeline import Timeline

    given = _inputs(run, rank)
    results: dict[str, Tensor] = {}
    # the backward pass computes with what the forward pass left
    passes = run.passes if run.held or "forward" in run.passes else ("forward", *run.passes)
    for which in passes:
        schedule = run.schedule(which, rank)
        alone = None if run.held else Alone(schedule, given)
        for repetition in range(run.repetitions + 1):
            timeline = Timeline("measured")
            inputs = {value.name: _given(given, value) for value in schedule.inputs}
            if (
                alone is not None
            ):  # all ranks at once, as they share the machine; in turns, since its speed drifts
                start_together(transport)
                alone.measure()
            start_together(transport)
            made = executor.run(schedule, inputs, timeline)
            if repetition:
                timeline.write(run.timeline_file(which, repetition, rank))
        if alone is not None:
            run.seconds_file(which, rank).write_text(json.dumps(alone.seconds()))
            given |= made
            results |= {name: made[name] for name in ("out", "dq", "dk", "dv") if name in made}
    if not run.held:
        torch.save(results, run.results_file(rank))


def full_inputs(problem: AttentionProblem) -> dict[str, Tensor]:
    """q, k, v and dout of the whole sequence (batch, tokens, heads, head_dim), the same in every process."""
    import torch

    shape, tokens = problem.shape, problem.layout.tokens
    generator = torch.Generator().manual_seed(0)
    heads = {"q": shape.heads, "k": shape.kv_heads, "v": shape.kv_heads, "dout": shape.heads}
    return {
        name: torch.randn(shape.batch, tokens, count, shape.head_dim, generator=generator)
        for name, count in heads.items()
    }


def _inputs(run: Run, rank: int) -> dict[str, Tensor]:
    if run.held:
        return {}
    assert isinstance(run.problem, AttentionProblem), "kernels of linear attention are held"
    whole = full_inputs(run.problem)
    return {name: run.problem.layout.shard(x, rank, dim=1).contiguous() for name, x in whole.items()}


def _given(given: dict[str, Tensor], value) -> Tensor:
    import torch

    from counterpoint.kernels.kernel import torch_dtype

    if value.name not in given:
        given[value.name] = torch.zeros(value.spec.shape, dtype=torch_dtype(value.spec.dtype))
    return given[value.name]


def _latencies(transport) -> dict[int, float]:
    """One-way seconds of a small message to every rank of a higher number; pairs measure one after the other."""
    import torch

    ranks, found = len(transport.ranks), {}
    for a in range(ranks):
        for b in range(a + 1, ranks):
            transport.exchange_count(0)
            if transport.rank not in (a, b):
                continue
            peer, trips = a + b - transport.rank, []
            message = torch.zeros(1)
            for _ in range(PING):
                started = time.perf_counter()
                receiving = transport.irecv([message], peer, "ping")
                if transport.rank == a:
                    transport.wait(transport.isend([torch.ones(1)], peer, "ping"))
                transport.wait(receiving)
                if transport.rank == b:
                    transport.wait(transport.isend([message], peer, "ping"))
                trips.append(time.perf_counter() - started)
            if transport.rank == a:
                found[b] = sorted(trips)[PING // 2] / 2
    return found


def start_together(transport) -> None:
    """Return at the same moment on all ranks: rank 0 names one, on the clock that all processes share."""
    names = transport.exchange_count(int((time.perf_counter() + 0.05) * 1e9))
    while (left := names[0] / 1e9 - time.perf_counter()) > 0:
        time.sleep(left)
