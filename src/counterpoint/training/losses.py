"""The losses of the tokens that one process holds, of a sequence or of several that a group of processes shares."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from counterpoint.kernels.mask import AttentionMask
from counterpoint.model.decoder import Decoder
from counterpoint.model.loss import IGNORE, token_loss
from counterpoint.runtime.memory.layers import layer_runs
from counterpoint.runtime.memory.offload import PinnedHost
from counterpoint.schedule.timeline import Timeline
from counterpoint.strategies.memory.policy import LayerPolicy, MemoryPolicy
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.training.config import TrainConfig
from counterpoint.training.mesh import Processes
from counterpoint.training.mixing import mixing
from counterpoint.training.precision import precision


@dataclass(frozen=True, slots=True)
class Shard:
    """What a process holds of sequences that lie over several: part `place` of the layout.

    tokens, labels (1, local tokens) int64, in the layouts of the first and of the last layer. ranks: those of the
    sequence mesh that share the sequences; None for all. offload: share of the kept activations that goes to host
    memory, where there is one apart from the device's.
    """

    tokens: Tensor
    labels: Tensor
    layout: SequenceLayout
    place: int
    ranks: tuple[int, ...] | None = None
    offload: float = 0.0

    @property
    def counted(self) -> int:
        """How many of the tokens have a label."""
        return int((self.labels != IGNORE).sum())


def shard_losses(
    model: Decoder, shard: Shard, config: TrainConfig, processes: Processes, timeline: Timeline | None = None
) -> Tensor:
    """Sum of the losses of a shard's tokens; collective over the processes that hold the other shards."""
    shape, device, layout = model.config, processes.device, shard.layout
    mixed = mixing(shape, config.parallel, layout, processes.sequence, timeline, shard.ranks)
    masks = [AttentionMask(window=shape.window(layer), documents=layout.documents) for layer in shape.layers]
    memory = _memory(config.memory.policy, shard, device)
    labels = shard.labels.to(device)
    tier = PinnedHost.of(device) if device.type == "cuda" else None
    with precision(config, processes):
        return model(
            shard.tokens.to(device),
            mixed.positions.position_ids(shard.place).to(device),
            mixed.attends,
            run=layer_runs(memory, len(masks), masks if layout.world_size == 1 else None, tier),
            use=lambda hidden, head: token_loss(hidden, head.weight, labels, memory.head_tokens)[0],
            moves=mixed.moves,
        )


def _memory(policy: MemoryPolicy, shard: Shard, device: torch.device) -> MemoryPolicy:
    """The policy for one shard: what is kept may be offloaded, and nothing can be cut in chunks."""
    layers = policy.layers
    if shard.offload and device.type != "cpu":
        away = LayerPolicy("offload", ratio=shard.offload)
        layers = tuple(away if layer.kind == "keep" else layer for layer in layers)
    if not shard.tokens.numel():  # the other ranks of the group run attention as often, chunks or not
        layers = tuple(LayerPolicy("recompute") if layer.kind == "stream" else layer for layer in layers)
    return replace(policy, layers=layers)
