"""Moving a sharded tensor from one sequence layout to another, differentiably."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from counterpoint.kernels.kernel import TensorSpec
from counterpoint.runtime.engine import Engine
from counterpoint.schedule.timeline import Timeline
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.strategies.sequence.relayout import relayout_schedule

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def relayout(
    x: Tensor,
    source: SequenceLayout,
    target: SequenceLayout,
    *,
    mesh: DeviceMesh | None = None,
    dim: int = 1,
    timeline: Timeline | None = None,
    timeout: float = 300.0,
) -> Tensor:
    """This rank's part of a tensor in the layout `target`, from its part in the layout `source`.

    x: any shape, with this rank's tokens of `source` in dim `dim`. Collective over the mesh; gradients take the way
    back. timeline: what happens is appended to it. Raises ValueError when the layouts or x do not fit the mesh,
    PeerFailure when a peer is lost.
    """
    engine = Engine.of(mesh, timeout=timeout)
    if source.world_size != engine.world_size:
        raise ValueError(f"the layout is for {source.world_size} ranks, the mesh has {engine.world_size}")
    if x.shape[dim] != source.local_tokens(engine.rank):
        raise ValueError(
            f"rank {engine.rank} holds {source.local_tokens(engine.rank)} tokens of the {source.kind} layout, "
            f"but dim {dim} of x has {x.shape[dim]}"
        )
    rows = x.movedim(dim, 0).unsqueeze(0)  # schedules keep tokens in dim 1
    return _Relayout.apply(rows, source, target, engine, timeline).squeeze(0).movedim(0, dim)  # type: ignore[attr-defined]


class _Relayout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, source: SequenceLayout, target: SequenceLayout, engine: Engine, timeline
    ) -> Tensor:
        ctx.layouts, ctx.engine, ctx.timeline = (source, target), engine, timeline
        return _move(x.detach(), source, target, engine, timeline)

    @staticmethod
    def backward(ctx, *grads):
        source, target = ctx.layouts
        return _move(grads[0], target, source, ctx.engine, ctx.timeline), None, None, None, None


def _move(
    x: Tensor, source: SequenceLayout, target: SequenceLayout, engine: Engine, timeline: Timeline | None
) -> Tensor:
    spec = TensorSpec(tuple(x.shape), str(x.dtype).removeprefix("torch."))
    schedule = relayout_schedule(spec.with_size(1, 0), source, target, engine.rank)
    given = {"x": x} if schedule.inputs else {}
    made = engine.run(schedule, given, timeline)
    return made.get("y", x.new_empty((x.shape[0], 0, *x.shape[2:])))
