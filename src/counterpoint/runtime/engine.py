"""The ranks of a mesh with what they need to run schedules: a transport and an executor, kept with the mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from counterpoint.runtime.executor import Executor
from counterpoint.runtime.transport import Transport
from counterpoint.schedule.place import check_ranks
from counterpoint.schedule.schedule import Schedule
from counterpoint.schedule.timeline import Timeline

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_KEPT = "_counterpoint_engines"


class Engine:
    """Runs schedules on the ranks of a DeviceMesh, numbered row by row; without a mesh, on this process alone.

    Creating one is collective over the ranks of the mesh. timeout: seconds after which a silent peer counts as lost.
    """

    def __init__(self, mesh: DeviceMesh | None = None, *, timeout: float = 300.0) -> None:
        self.shape: tuple[int, ...] = (1,) if mesh is None else tuple(mesh.shape)
        ranks = [0] if mesh is None else mesh.mesh.flatten().tolist()
        self.world_size = len(ranks)
        self.rank = 0
        transport, device = None, torch.device("cpu")
        if mesh is not None:
            import torch.distributed as dist

            if dist.get_rank() not in ranks:
                raise ValueError(
                    f"rank {dist.get_rank()} is not on the mesh {ranks}; call this on its ranks only"
                )
            self.rank = ranks.index(dist.get_rank())
            if mesh.device_type == "cuda":
                device = torch.device("cuda", torch.cuda.current_device())
        if self.world_size > 1 and device.type == "cuda":
            from counterpoint.runtime.cuda import CudaExecutor

            self.executor: Executor | CudaExecutor = CudaExecutor(ranks, self.rank, device, timeout=timeout)
        else:
            if self.world_size > 1:
                transport = Transport(ranks, self.rank, timeout=timeout)
            self.executor = Executor(transport, device)
        self.transport = transport

    @classmethod
    def of(cls, mesh: DeviceMesh | None, *, timeout: float = 300.0) -> Engine:
        """The engine of a mesh, made at the first call and then kept on the mesh it was sliced from.

        `mesh["sequence"]` is another object every time; its engine, with connections and threads, must not be.
        """
        if mesh is None:
            return cls()
        root = getattr(mesh, "_get_root_mesh", lambda: mesh)()
        if not hasattr(root, _KEPT):
            setattr(root, _KEPT, {})
        kept, key = getattr(root, _KEPT), (tuple(mesh.shape), tuple(mesh.mesh.flatten().tolist()))
        if key not in kept:
            kept[key] = cls(mesh, timeout=timeout)
        return kept[key]

    def run(
        self, schedule: Schedule, inputs: Mapping[str, Tensor], timeline: Timeline | None = None
    ) -> dict[str, Tensor]:
        """Execute this rank's schedule; see `Executor.run`."""
        return self.executor.run(schedule, inputs, timeline)

    def place_in(self, ranks: Sequence[int] | None) -> int:
        """This rank's number in a group of ranks of the mesh, None being all: its place in the list.

        Groups need no communicator of their own; see schedule/place.py for why their messages cannot mix. Raises
        ValueError for ranks that are not of the mesh, and on a rank that is not in the group.
        """
        if ranks is None:
            return self.rank
        check_ranks(ranks, self.world_size)
        if self.rank not in ranks:
            raise ValueError(
                f"rank {self.rank} is not in the group {list(ranks)}; call this on its ranks only"
            )
        return list(ranks).index(self.rank)

    def local_lengths(self, tokens: int) -> list[int]:
        """How many tokens every rank holds, in rank order; collective."""
        if self.world_size == 1:
            return [tokens]
        if self.transport is not None:
            return self.transport.exchange_count(tokens)
        import torch.distributed as dist

        lengths = torch.zeros(self.world_size, dtype=torch.int64, device=self.executor.device)
        lengths[self.rank] = tokens
        dist.all_reduce(lengths, group=getattr(self.executor, "group", None))
        return lengths.tolist()
