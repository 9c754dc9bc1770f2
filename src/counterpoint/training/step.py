"""One step of training: the loss of a global batch, its gradients, the update.

Every rank sees the same stream of packed sequences. Of a global batch, replica d of D takes sequences
d, d + D, ...; the processes of a replica share each sequence token by token, as the layout says. The loss is
the mean over all tokens of the global batch, so it does not depend on how the work is split.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from counterpoint.kernels.mask import AttentionMask
from counterpoint.model.decoder import Decoder
from counterpoint.model.loss import IGNORE, token_loss
from counterpoint.runtime.memory.layers import layer_runs
from counterpoint.schedule.timeline import Timeline
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.training.config import TrainConfig
from counterpoint.training.data import PackedStream
from counterpoint.training.mesh import Processes
from counterpoint.training.mixing import mixing
from counterpoint.training.optimizer import clip_gradients
from counterpoint.training.packing import Batch


@dataclass(frozen=True, slots=True)
class StepResult:
    """Mean loss per token, global gradient norm before clipping, share of communication time exposed."""

    loss: float
    gradient_norm: float
    exposed: float | None


def train_step(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    stream: PackedStream,
    config: TrainConfig,
    processes: Processes,
    timeline: Timeline | None = None,
) -> StepResult:
    """One optimizer step over a global batch; spans of its attention are added to `timeline`."""
    batches = list(own_sequences(stream, config.training.global_batch, processes))
    (count,) = processes.sum(_own_tokens(batches, processes))
    losses = 0.0
    for i, batch in enumerate(batches):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(i == len(batches) - 1)
        loss = token_losses(model, batch, config, processes, timeline)
        # FSDP averages gradients over all processes; what is wanted is their sum over the token count
        (loss * (processes.world_size / max(count, 1))).backward()
        losses += float(loss.detach())
    norm = clip_gradients(model, config.optimizer.clip)
    optimizer.step()
    optimizer.zero_grad()
    total, exposed, traffic = processes.sum(losses, *_communication(timeline))
    return StepResult(total / max(count, 1), norm, exposed / traffic if traffic else None)


@torch.no_grad()
def evaluate(model: Decoder, stream: PackedStream, config: TrainConfig, processes: Processes) -> float:
    """Mean loss per token on the next `evaluate_batches` global batches of a stream."""
    n = config.training.evaluate_batches * config.training.global_batch
    losses, count = 0.0, 0
    for batch in own_sequences(stream, n, processes):
        losses += float(token_losses(model, batch, config, processes))
        count += _own_tokens([batch], processes)
    losses, count = processes.sum(losses, count)
    return losses / max(count, 1)


def token_losses(
    model: Decoder, batch: Batch, config: TrainConfig, processes: Processes, timeline: Timeline | None = None
) -> Tensor:
    """Sum of the losses of this process's tokens of a sequence."""
    parallel, shape = config.parallel, model.config
    rank, device = processes.sequence_rank, processes.device
    layout = SequenceLayout(
        parallel.layout, batch.tokens.shape[1], processes.sequence_size, tuple(batch.documents)
    )
    mixed = mixing(shape, parallel, layout, processes.sequence, timeline)
    masks = [AttentionMask(window=shape.window(layer), documents=layout.documents) for layer in shape.layers]
    memory = config.memory.policy
    labels = mixed.layouts[-1].shard(batch.labels, rank).to(device)
    with _precision(config, processes):
        return model(
            mixed.layouts[0].shard(batch.tokens, rank).to(device),
            mixed.positions.position_ids(rank).to(device),
            mixed.attends,
            run=layer_runs(memory, len(shape.layers), masks if processes.sequence_size == 1 else None),
            use=lambda hidden, head: token_loss(hidden, head.weight, labels, memory.head_tokens)[0],
            moves=mixed.moves,
        )


def own_sequences(stream: PackedStream, n: int, processes: Processes) -> Iterator[Batch]:
    """This replica's share of the next n sequences of the stream; every rank advances by all n."""
    for i in range(n):
        if i % processes.data_size == processes.data_rank:
            yield next(stream)
        else:
            stream.skip(1)


def shard(model: Decoder, config: TrainConfig, processes: Processes) -> Decoder:
    """The model on its device, its state spread over all processes by FSDP2, layer by layer.

    Raises ValueError for bfloat16 without a GPU.
    """
    if config.training.precision == "bfloat16" and processes.device.type == "cpu":
        raise ValueError("training.precision = bfloat16 needs a GPU (CPUs are far slower at it); use auto")
    model = model.to(processes.device)
    if processes.state is None:
        return model
    policy = MixedPrecisionPolicy()
    if _half(config, processes):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=processes.state, mp_policy=policy)
    fully_shard(model, mesh=processes.state, mp_policy=policy)
    return model


# ---- helpers -----------------------------------------------------------------------------------------
def _own_tokens(batches: list[Batch], processes: Processes) -> int:
    # one process of a replica counts, the others hold the same sequences
    if processes.sequence_rank != 0:
        return 0
    return sum(int((batch.labels != IGNORE).sum()) for batch in batches)


def _half(config: TrainConfig, processes: Processes) -> bool:
    wanted = config.training.precision
    return wanted == "bfloat16" or (wanted == "auto" and processes.device.type == "cuda")


def _precision(config: TrainConfig, processes: Processes) -> AbstractContextManager[Any]:
    # over several processes FSDP casts; a single one uses autocast
    if processes.state is None and _half(config, processes):
        return torch.autocast(processes.device.type, torch.bfloat16)
    return nullcontext()


def _communication(timeline: Timeline | None) -> tuple[float, float]:
    """Seconds of communication in which nothing was computed, and all seconds of communication."""
    if timeline is None or not timeline.spans:
        return 0.0, 0.0
    seconds = [timeline.categories(rank) for rank in timeline.ranks]
    exposed = sum(s["exposed"] for s in seconds)
    return exposed, exposed + sum(s["hidden"] for s in seconds)
