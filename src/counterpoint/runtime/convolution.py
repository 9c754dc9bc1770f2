"""A short causal convolution over a sequence that is sharded over ranks, as one differentiable call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from counterpoint.kernels.convolution import convolve
from counterpoint.kernels.kernel import TensorSpec
from counterpoint.runtime.engine import Engine
from counterpoint.runtime.group import Group, agreed_layout
from counterpoint.schedule.schedule import Schedule
from counterpoint.schedule.timeline import Timeline
from counterpoint.strategies.sequence.halo import halo_range, halo_schedule
from counterpoint.strategies.sequence.layout import SequenceLayout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def short_convolution(
    x: Tensor,
    weight: Tensor,
    *,
    mesh: DeviceMesh | None = None,
    ranks: tuple[int, ...] | None = None,
    layout: SequenceLayout | None = None,
    timeline: Timeline | None = None,
    timeout: float = 300.0,
) -> Tensor:
    """A causal convolution along the tokens of all ranks, one filter per channel; equal to that of one process.

    x: (batch, local_tokens, channels). weight: (channels, width), the last tap being the token itself, as in nn.Conv1d.
    Returns y, shaped like x. Before the first token of a document lies nothing. A rank receives the width - 1 tokens
    before its own, from as many ranks as hold them. mesh, ranks, layout, timeline, timeout: as in `linear_attention`.

    Raises ValueError for shapes and layouts that do not fit, PeerFailure when a peer is lost.
    """
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[2] or not weight.shape[1]:
        raise ValueError(
            f"x must be (batch, local_tokens, channels) and weight (channels, width), "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    group = Group.of(Engine.of(mesh, timeout=timeout), ranks)
    layout = agreed_layout(group, "contiguous" if layout is None else layout, x.shape[1])
    width = weight.shape[1]
    whole = len(layout.documents) < 2  # no tap has to stop at the start of a document
    positions = None if whole else layout.position_ids(group.place).to(x.device)
    if layout.world_size == 1 or width == 1:
        return convolve(x, weight, None, positions)
    halo = _Halo.apply(x, group, layout, width, timeline)
    assert isinstance(halo, Tensor)
    return convolve(x, weight, halo, positions)


_Problem = tuple[TensorSpec, SequenceLayout, int]


def _forward(problem: _Problem, rank: int) -> Schedule:
    return halo_schedule(*problem, rank, "forward")


def _backward(problem: _Problem, rank: int) -> Schedule:
    return halo_schedule(*problem, rank, "backward")


class _Halo(torch.autograd.Function):
    """x -> the tokens before it; their gradients go back to where they came from."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Group, layout: SequenceLayout, width: int, timeline) -> Tensor:
        spec = TensorSpec((x.shape[0], 0, x.shape[2]), str(x.dtype).removeprefix("torch."))
        ctx.group, ctx.problem, ctx.timeline = group, (spec, layout, width), timeline
        ctx.like = x.shape, x.dtype, x.device
        schedule = group.schedule(_forward, ctx.problem)
        made = group.engine.run(schedule, {"x": x.detach()}, timeline)
        start, stop = halo_range(layout, width, group.place)
        return made["halo"] if "halo" in made else x.new_empty(x.shape[0], stop - start, x.shape[2])

    @staticmethod
    def backward(ctx, *grads):
        schedule = ctx.group.schedule(_backward, ctx.problem)
        made = ctx.group.engine.run(schedule, {"dhalo": grads[0].contiguous()}, ctx.timeline)
        shape, dtype, device = ctx.like
        dx = made["dx"] if "dx" in made else torch.zeros(shape, dtype=dtype, device=device)
        return dx, None, None, None, None
