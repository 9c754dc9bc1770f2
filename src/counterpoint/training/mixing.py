"""How the tokens of a sharded sequence meet in every layer of a model, and in which layout each layer keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Attend, Move
from counterpoint.model.linear import Mix
from counterpoint.runtime.attention import attention
from counterpoint.runtime.convolution import short_convolution
from counterpoint.runtime.linear import linear_attention
from counterpoint.runtime.relayout import relayout
from counterpoint.schedule.timeline import Timeline
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.training.config import ParallelConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True)
class Mixing:
    """What a decoder is given for one sequence.

    attends: of every layer. moves: by layer, the change of layout before it. layouts: of every layer; tokens come in
    the first one, labels in the last, and position_ids in `positions`, that of the softmax layers.
    """

    attends: list[Attend | Mix]
    moves: dict[int, Move]
    layouts: tuple[SequenceLayout, ...]
    positions: SequenceLayout


def layer_layouts(shape: ModelConfig, layout: SequenceLayout) -> tuple[SequenceLayout, ...]:
    """The layout of every layer: linear attention takes tokens in order, whatever suits softmax layers."""
    ordered = SequenceLayout("contiguous", layout.tokens, layout.world_size, layout.documents)
    return tuple(
        ordered if shape.is_linear(layer) and layout.world_size > 1 else layout for layer in shape.layers
    )


def mixing(
    shape: ModelConfig,
    parallel: ParallelConfig,
    layout: SequenceLayout,
    mesh: DeviceMesh | None,
    timeline: Timeline | None,
    ranks: tuple[int, ...] | None = None,
) -> Mixing:
    """The layers of a model over a sequence in `layout`.

    mesh: of the processes that share it; ranks: those of them that do, when not all.
    """
    forward, backward = parallel.strategies
    shared = {"mesh": mesh, "timeline": timeline, "timeout": parallel.timeout}
    attend = partial(attention, ranks=ranks, layout=layout, forward=forward, backward=backward, **shared)
    layouts = layer_layouts(shape, layout)
    attends: list[Attend | Mix] = [
        States(layouts[layer], mesh, ranks, parallel.linear, timeline, parallel.timeout)
        if shape.is_linear(layer)
        else partial(attend, window=shape.window(layer))
        for layer in shape.layers
    ]
    moves: dict[int, Move] = {
        layer: partial(relayout, source=layouts[layer - 1], target=layouts[layer], ranks=ranks, **shared)
        for layer in shape.layers[1:]
        if layouts[layer] != layouts[layer - 1]
    }
    return Mixing(attends, moves, layouts, layout)


@dataclass(frozen=True, slots=True)
class States:
    """Linear attention of the ranks of a mesh, or of those in `ranks`."""

    layout: SequenceLayout
    mesh: DeviceMesh | None
    ranks: tuple[int, ...] | None
    strategy: str
    timeline: Timeline | None
    timeout: float

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
        return linear_attention(
            q, k, v, log_decay, mesh=self.mesh, ranks=self.ranks, layout=self.layout, forward=self.strategy,
            check=False, timeline=self.timeline, timeout=self.timeout,
        )  # fmt: skip

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        return short_convolution(
            x, weight, mesh=self.mesh, ranks=self.ranks, layout=self.layout, timeline=self.timeline,
            timeout=self.timeout,
        )  # fmt: skip
