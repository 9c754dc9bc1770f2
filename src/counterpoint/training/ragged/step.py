"""The loss and the gradients of a ragged global batch, by its plan.

Every rank goes through its own groups in the order of the plan, and needs the others only inside a group. So ranks may
have more or fewer micro-batches, or none: parameters are whole from the first to the last of them, gradients add up
where they are, and one reduction at the end sums them over all ranks. The loss is the sum of the token losses over
all groups divided by the number of tokens, so no plan changes it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Decoder
from counterpoint.planner.batch import BatchPlan, Group
from counterpoint.runtime.engine import Engine
from counterpoint.schedule.timeline import Timeline
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.training.config import TrainConfig
from counterpoint.training.losses import Shard, shard_losses
from counterpoint.training.mesh import Processes
from counterpoint.training.mixing import States, layer_layouts
from counterpoint.training.ragged.stream import Place, RaggedStream

LAYOUT = (
    "document-zigzag"  # every sequence in pieces of its own, so that all ranks of a group have equal work
)


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """A global batch: its sequences, and the plan over their lengths.

    waited: seconds that training waited for the plan.
    """

    places: tuple[Place, ...]
    plan: BatchPlan
    waited: float = 0.0


def own_shards(
    batch: RaggedBatch, stream: RaggedStream, rank: int, shape: ModelConfig
) -> list[tuple[Group, Shard]]:
    """What a rank holds of a batch, group by group; only sequences that it has tokens of are read."""
    return [(group, _shard(batch, group, stream, rank, shape)) for _, group in batch.plan.of_rank(rank)]


def ragged_gradients(
    model: Decoder,
    batch: RaggedBatch,
    stream: RaggedStream,
    config: TrainConfig,
    processes: Processes,
    timeline: Timeline | None = None,
) -> tuple[float, int, float]:
    """Backward passes of a whole batch: gradients of the mean loss per token are left in the model.

    Returns the sum of this rank's token losses, the number of tokens that count on all ranks, and the seconds that
    this rank computed. Collective over all ranks.
    """
    connect(config, processes)
    shards = own_shards(batch, stream, processes.rank, model.config)
    (count,) = processes.sum(sum(shard.counted for _, shard in shards))
    count, losses = max(int(count), 1), 0.0
    with whole_parameters(model):
        began = time.perf_counter()
        for _, shard in shards:
            loss = shard_losses(model, shard, config, processes, timeline)
            # FSDP averages gradients over all processes; what is wanted is their sum over the token count
            (loss * (processes.world_size / count)).backward()
            losses += float(loss.detach())
        seconds = time.perf_counter() - began
        reduce_gradients(model, processes.device)
    return losses, count, seconds


@torch.no_grad()
def ragged_losses(
    model: Decoder, batch: RaggedBatch, stream: RaggedStream, config: TrainConfig, processes: Processes
) -> tuple[float, int]:
    """Sum of this rank's token losses of a batch, and how many tokens counted here."""
    connect(config, processes)
    shards = own_shards(batch, stream, processes.rank, model.config)
    with whole_parameters(model):
        losses = sum(float(shard_losses(model, shard, config, processes)) for _, shard in shards)
    return losses, sum(shard.counted for _, shard in shards)


def connect(config: TrainConfig, processes: Processes) -> None:
    """Open the connections between all ranks, once: that takes all of them, and one may never meet the others."""
    Engine.of(processes.sequence, timeout=config.parallel.timeout)


@contextmanager
def whole_parameters(model: Decoder) -> Iterator[None]:
    """All parameters gathered on every rank once, and gradients not reduced meanwhile; then sharded again."""
    if not isinstance(model, FSDPModule):
        yield
        return
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    model.set_reshard_after_forward(False)
    model.set_reshard_after_backward(False)
    model.set_requires_gradient_sync(False)
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        model.set_reshard_after_forward(True)
        model.set_reshard_after_backward(True)
        model.set_requires_gradient_sync(True)
        for module in sharded:
            module.reshard()


def reduce_gradients(model: Decoder, device: torch.device) -> None:
    """Sum over all ranks the gradients that each has gathered; inside `whole_parameters`.

    FSDP reduces in a backward pass, and ranks without work have had none. So all take one more together, of a single
    token whose loss counts nothing: it adds zeros everywhere, and exchanges nothing but the gradients.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_gradient_sync(True)
    model.set_reshard_after_backward(True)
    nothing = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    states = States(SequenceLayout("contiguous", 1, 1), None, None, "states", None, 0.0)
    attends = [states if model.config.is_linear(layer) else attend for layer in model.config.layers]
    loss, _ = model(nothing, nothing[0], attends, nothing)
    (loss * 0.0).backward()


def _shard(batch: RaggedBatch, group: Group, stream: RaggedStream, rank: int, shape: ModelConfig) -> Shard:
    lengths = tuple(batch.places[i].length for i in group.sequences)
    layout = SequenceLayout(LAYOUT, sum(lengths), len(group.ranks), lengths)
    place, layouts = group.ranks.index(rank), layer_layouts(shape, layout)
    first, last = ([torch.empty(1, 0, dtype=torch.int64)] for _ in range(2))
    inside = [_by_document(end, place) for end in (layouts[0], layouts[-1])]
    for number, index in enumerate(group.sequences):
        here, there = inside[0][number], inside[1][number]
        if len(here) or len(there):
            whole = stream.read(batch.places[index])
            first.append(whole.tokens[:, here])
            last.append(whole.labels[:, there])
    return Shard(torch.cat(first, 1), torch.cat(last, 1), layout, place, group.ranks, group.offload)


def _by_document(layout: SequenceLayout, place: int) -> list[torch.Tensor]:
    """Positions inside each document of the tokens that a rank holds."""
    positions = layout.positions(place)
    bounds = torch.searchsorted(positions, torch.tensor([*layout.starts, layout.tokens])).tolist()
    starts = zip(layout.starts, bounds, bounds[1:], strict=False)
    return [positions[begin:end] - start for start, begin, end in starts]
