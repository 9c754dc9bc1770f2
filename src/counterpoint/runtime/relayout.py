"""Moving a sharded tensor from one sequence layout to another, differentiably."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from counterpoint.kernels.kernel import TensorSpec
from counterpoint.runtime.engine import Engine
from counterpoint.runtime.group import Group
from counterpoint.schedule.schedule import Schedule
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
    ranks: tuple[int, ...] | None = None,
    dim: int = 1,
    timeline: Timeline | None = None,
    timeout: float = 300.0,
) -> Tensor:
    """This rank's part of a tensor in the layout `target`, from its part in the layout `source`.

    x: any shape, with this rank's tokens of `source` in dim `dim`. Collective over the mesh, or over `ranks` of it;
    gradients take the way back. timeline: what happens is appended to it. Raises ValueError when the layouts or x do
    not fit the mesh, PeerFailure when a peer is lost.
    """
    group = Group.of(Engine.of(mesh, timeout=timeout), ranks)
    size, what = (group.engine.world_size, "mesh") if ranks is None else (len(ranks), "group")
    if source.world_size != size:
        raise ValueError(f"the layout is for {source.world_size} ranks, the {what} has {size}")
    if x.shape[dim] != source.local_tokens(group.place):
        raise ValueError(
            f"rank {group.engine.rank} holds {source.local_tokens(group.place)} tokens of the {source.kind} layout, "
            f"but dim {dim} of x has {x.shape[dim]}"
        )
    rows = x.movedim(dim, 0).unsqueeze(0)  # schedules keep tokens in dim 1
    return _Relayout.apply(rows, source, target, group, timeline).squeeze(0).movedim(0, dim)  # type: ignore[attr-defined]


class _Relayout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, source: SequenceLayout, target: SequenceLayout, group: Group, timeline
    ) -> Tensor:
        ctx.layouts, ctx.group, ctx.timeline = (source, target), group, timeline
        return _move(x.detach(), source, target, group, timeline)

    @staticmethod
    def backward(ctx, *grads):
        source, target = ctx.layouts
        return _move(grads[0], target, source, ctx.group, ctx.timeline), None, None, None, None


def _move(
    x: Tensor, source: SequenceLayout, target: SequenceLayout, group: Group, timeline: Timeline | None
) -> Tensor:
    spec = TensorSpec(tuple(x.shape), str(x.dtype).removeprefix("torch."))
    schedule = group.schedule(_schedule, (spec.with_size(1, 0), source, target))
    given = {"x": x} if schedule.inputs else {}
    made = group.engine.run(schedule, given, timeline)
    return made.get("y", x.new_empty((x.shape[0], 0, *x.shape[2:])))


def _schedule(problem: tuple[TensorSpec, SequenceLayout, SequenceLayout], rank: int) -> Schedule:
    return relayout_schedule(*problem, rank)
