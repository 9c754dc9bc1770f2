"""Ranks as processes that talk over gloo, started once per world size and shared by all tests of a session.

    from support.processes import mesh

    @pytest.mark.processes
    def test_something(gloo):                       # the fixture of tests/conftest.py
        results = gloo(4).run(job, 1e-3)            # one result per rank, in rank order

    def job(rank, tolerance):                       # top-level; runs on every rank, default process group is ready
        out = counterpoint.attention(..., mesh=mesh(4))
        return out                                  # whatever can be pickled

A rank that raises makes `run` raise WorkerError with every rank's traceback, and the next `gloo(4)` starts fresh
processes. Each process computes with one thread. For processes that a test wants to kill, start its own `Workers`.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from functools import lru_cache
from multiprocessing.connection import wait as ready
from pathlib import Path
from types import ModuleType
from typing import Any

TESTS = Path(__file__).parents[1]


class WorkerError(AssertionError):
    """A job failed; the message holds the traceback of every rank that did."""


class Workers:
    """`world_size` processes in one gloo group. store: "parent" keeps the rendezvous store here, "rank0" in rank 0."""

    def __init__(self, world_size: int, *, store: str = "parent") -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["torch", "torch._dynamo", "torch.distributed.fsdp", "counterpoint.runtime.attention"]
        )
        self.world_size = world_size
        self.store = (
            TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if store == "parent" else None
        )
        pipes = [context.Pipe() for _ in range(world_size)]
        self.pipes = [here for here, _ in pipes]
        self.processes = [
            context.Process(target=_work, args=(rank, world_size, there), name=f"rank {rank}", daemon=True)
            for rank, (_, there) in enumerate(pipes)
        ]
        for process, (_, there) in zip(self.processes, pipes, strict=True):
            process.start()
            there.close()
        port = self.store.port if self.store else self._ask_rank_0()
        for rank, pipe in enumerate(self.pipes):
            if rank or self.store:
                pipe.send(port)
        self._collect(60.0)

    def _ask_rank_0(self) -> int:
        self.pipes[0].send(None)
        return self.pipes[0].recv()

    def run(self, job: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """`job(rank, *args)` on every rank; their results in rank order."""
        self.start(job, *args)
        return self._collect(timeout)

    def start(self, job: Callable[..., Any], *args: Any) -> None:
        """Start a job without waiting for it; see `outcomes`."""
        code = job.__code__
        for pipe in self.pipes:
            pipe.send((code.co_filename, job.__qualname__, args))

    def outcomes(self, timeout: float) -> dict[int, tuple[str, Any]]:
        """What the ranks answered in time: ("result", value), ("error", traceback) or ("lost", exit code)."""
        answers: dict[int, tuple[str, Any]] = {}
        open_pipes, deadline = (
            dict(zip(self.pipes, range(self.world_size), strict=True)),
            time.monotonic() + timeout,
        )
        while open_pipes and (left := deadline - time.monotonic()) > 0:
            for pipe in ready(list(open_pipes), left):
                rank = open_pipes.pop(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionError):
                    answers[rank] = ("lost", f"exit code {self.processes[rank].exitcode}")
        return answers

    def _collect(self, timeout: float) -> list[Any]:
        answers = self.outcomes(timeout)
        if all(answers.get(rank, ("",))[0] == "result" for rank in range(self.world_size)):
            return [answers[rank][1] for rank in range(self.world_size)]
        self.close()
        missing = ("no answer", f"within {timeout:g} s")
        told = ((rank, *answers.get(rank, missing)) for rank in range(self.world_size))
        raise WorkerError(
            "\n".join(f"rank {rank}, {what}: {text}" for rank, what, text in told if what != "result")
        )

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        """Kill what still runs."""
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join(10)
            pipe.close()


class Pools:
    """`pools(4)` is the pool of 4 processes; made at the first call and again after a failure."""

    def __init__(self) -> None:
        self.kept: dict[int, Workers] = {}

    def __call__(self, world_size: int) -> Workers:
        workers = self.kept.get(world_size)
        if workers is None or not workers.alive:
            if workers is not None:
                workers.close()
            self.kept[world_size] = workers = Workers(world_size)
        return workers

    def close(self) -> None:
        for workers in self.kept.values():
            workers.close()


# ---- in the processes ----------------------------------------------------------------------------
def mesh(*shape: int, names: tuple[str, ...] | None = None) -> Any:
    """In a job: the DeviceMesh of this shape over all ranks, made once per process."""
    return _mesh(shape, names or tuple(f"axis{i}" for i in range(len(shape))))


@lru_cache(maxsize=64)
def _mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _work(rank: int, world_size: int, pipe: Any) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    torch.set_num_threads(1)
    sys.path.insert(0, str(TESTS))
    port = pipe.recv()
    if port is None:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pipe.send(store.port)
    else:
        store = TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    pipe.send(("result", None))
    modules: dict[str, ModuleType] = {}
    while True:
        try:
            path, name, args = pipe.recv()
        except EOFError:
            return
        try:
            if path not in modules:
                modules[path] = _module(path)
            pipe.send(("result", getattr(modules[path], name)(rank, *args)))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))


def _module(path: str) -> ModuleType:
    """A test module by its file, since pytest's own import leaves it without an importable name."""
    spec = importlib.util.spec_from_file_location(f"jobs_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
