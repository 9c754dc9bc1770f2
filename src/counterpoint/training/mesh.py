"""The processes of a run: the mesh data x sequence, and the few collectives that a trainer needs beside it.

World size 1 opens no process group; every function here then does the obvious local thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from counterpoint.runtime.errors import PeerFailure
from counterpoint.training.config import ParallelConfig
from counterpoint.training.launch import Worker

T = TypeVar("T")

# Preparing data or writing a checkpoint on one rank may take long while the others wait.
_PATIENCE = timedelta(minutes=60)
# Workers start at different speeds, whatever is asked of them once they run.
_ARRIVAL = timedelta(minutes=2)
# How gloo and NCCL say that another process is gone or silent.
_LOST = ("Connection closed by peer", "Connection reset", "Timed out waiting", "Broken pipe", "ncclRemote")


@dataclass(frozen=True, slots=True)
class Processes:
    """This process's place among all of them.

    `sequence` is the mesh (1-D, or 2-D for outer and inner axis) of the processes that share a sequence,
    `state` the 1-D mesh of all, over which parameters are sharded; both None in a single process.
    """

    rank: int
    world_size: int
    data_rank: int
    data_size: int
    sequence_rank: int
    sequence_size: int
    device: torch.device
    sequence: DeviceMesh | None = None
    state: DeviceMesh | None = None
    patient: dist.ProcessGroup | None = None

    def sum(self, *values: float) -> list[float]:
        """Sums over all processes, in double precision."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def sum_of_replica(self, value: float) -> float:
        """The sum over the processes that share a sequence; called by all processes of the run."""
        if self.sequence_size == 1:
            return value
        return self.sum(*(value if d == self.data_rank else 0.0 for d in range(self.data_size)))[
            self.data_rank
        ]

    def largest(self, value: float) -> float:
        """The largest value of all processes."""
        if self.world_size == 1:
            return value
        most = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return most.item()

    def gather(self, value: T) -> list[T]:
        """The values of all processes in rank order; on rank 0 only, [] on the others."""
        if self.patient is None:
            return [value]
        parts: list[Any] = [None] * self.world_size if self.rank == 0 else []
        dist.gather_object(value, parts if self.rank == 0 else None, dst=0, group=self.patient)
        return parts

    def first(self, work: Callable[[], T]) -> T:
        """What rank 0's `work` returns, on all ranks; its ValueError or OSError is raised on all of them."""
        result: list[Any] = [None]
        if self.rank == 0:
            try:
                result = [work()]
            except (ValueError, OSError) as error:
                result = [_Failed(error)]
        if self.patient is not None:
            dist.broadcast_object_list(result, src=0, group=self.patient)
        if isinstance(result[0], _Failed):
            raise result[0].error
        return result[0]


@dataclass(frozen=True, slots=True)
class _Failed:
    error: Exception


@contextmanager
def open_processes(parallel: ParallelConfig, worker: Worker | None) -> Iterator[Processes]:
    """Joins the workers of the run and lays the mesh over them; leaves them at the end.

    Raises:
        ValueError: the world size does not fit the mesh, or the meeting port is in use.
    """
    world_size = 1 if worker is None else worker.world_size
    sequence_size = parallel.sequence_size
    if parallel.data == "auto" or parallel.data * sequence_size != world_size:
        raise ValueError(
            f"{world_size} processes do not fit parallel.data x parallel.sequence = "
            f"{parallel.data} x {sequence_size}; change one of them"
        )
    local = 0 if worker is None else worker.local_rank
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local} has no GPU of its own, there are {torch.cuda.device_count()}; "
                "start fewer workers"
            )
        torch.cuda.set_device(device)
    if worker is None or world_size == 1:
        yield Processes(0, 1, 0, 1, 0, 1, device)
        return
    _join(worker, device, timedelta(seconds=parallel.timeout))
    patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(patient, dist.ProcessGroup)
    try:
        names = ("sequence",) if len(parallel.sequence) == 1 else ("outer", "inner")
        mesh = init_device_mesh(
            device.type, (parallel.data, *parallel.sequence), mesh_dim_names=("data", *names)
        )
        yield Processes(
            worker.rank,
            world_size,
            worker.rank // sequence_size,
            parallel.data,
            worker.rank % sequence_size,
            sequence_size,
            device,
            mesh[names] if len(names) > 1 else mesh[names[0]],
            mesh[("data", *names)]._flatten("state"),
            patient,
        )
        dist.barrier()
        dist.destroy_process_group()  # not after a failure: peers may be gone, and a goodbye would wait
    except PeerFailure as error:
        if parallel.data == 1:
            raise
        first = worker.rank // sequence_size * sequence_size  # the runtime numbers the ranks of its own mesh
        where = f"ranks count from 0 within the replica of ranks {first} to {first + sequence_size - 1}"
        raise PeerFailure(f"{error} ({where})", rank=first + error.rank, step=error.step) from error
    except RuntimeError as error:
        sign = next((sign for sign in _LOST if sign in str(error)), None)
        if sign is None:
            raise
        step = "a collective outside attention"
        message = f"rank {worker.rank} lost contact with another rank in {step}: {sign.lower()}"
        raise PeerFailure(message, rank=worker.rank, step=step) from error


def _join(worker: Worker, device: torch.device, timeout: timedelta) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    rank, world_size = worker.rank, worker.world_size
    try:
        if worker.parent is None:  # torchrun keeps the store
            dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
            return
        store = TCPStore(
            worker.address,
            worker.port,
            world_size,
            is_master=rank == 0,
            timeout=max(timeout, _ARRIVAL),
            master_listen_fd=worker.listen_fd,
        )
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise ValueError(
                f"port {worker.port} on {worker.address} is in use; set another MASTER_PORT"
            ) from None
        raise
    except dist.DistStoreError as error:
        raise ValueError(
            f"not all of {world_size} workers met at {worker.address}:{worker.port} within "
            f"{timeout.total_seconds():g} s; start them all, or raise parallel.timeout ({error})"
        ) from None
