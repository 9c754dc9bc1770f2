"""One step of training: the loss of a global batch, its gradients, the update.

Every rank sees the same stream of packed sequences. Of a global batch, replica d of D takes sequences
d, d + D, ...; the processes of a replica share each sequence token by token, as the layout says. The loss is
the mean over all tokens (or pairs, or groups) of the global batch, so it does not depend on how the work is split.
Ragged batches (training/ragged) are shared by the groups of their plans instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from counterpoint.kernels.mask import AttentionMask
from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Decoder, UseHidden
from counterpoint.model.loss import IGNORE, streamed_sum, token_logprobs, token_loss
from counterpoint.model.objectives import group_policy, preference, signed_sum
from counterpoint.planner.batch import BatchPlan
from counterpoint.runtime.memory.layers import layer_runs
from counterpoint.runtime.memory.offload import PinnedHost
from counterpoint.schedule.timeline import Timeline
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.training.config import TrainConfig
from counterpoint.training.data import PackedStream
from counterpoint.training.example_stream import ExampleStream
from counterpoint.training.mesh import Processes
from counterpoint.training.mixing import layer_layouts, mixing
from counterpoint.training.optimizer import clip_gradients
from counterpoint.training.packing import Batch
from counterpoint.training.phases import Phases
from counterpoint.training.precision import computes_in_half, precision
from counterpoint.training.ragged.source import RaggedBatches
from counterpoint.training.ragged.step import ragged_gradients, ragged_losses

Stream = PackedStream | ExampleStream


@dataclass(frozen=True, slots=True)
class PlanResult:
    """The plan of a ragged batch; the seconds its micro-batches took, and those that training waited for it."""

    plan: BatchPlan
    seconds: float
    waited: float


@dataclass(frozen=True, slots=True)
class StepResult:
    """Mean loss per token (dpo: pair, grpo: group), global gradient norm before clipping, share of communication
    time exposed, tokens of the global batch."""

    loss: float
    gradient_norm: float
    exposed: float | None
    tokens: int
    plan: PlanResult | None = None


def train_step(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    stream: Stream | RaggedBatches,
    config: TrainConfig,
    processes: Processes,
    timeline: Timeline | None = None,
    reference: Decoder | None = None,
    phases: Phases | None = None,
) -> StepResult:
    """One optimizer step over a global batch; spans of its attention are added to `timeline`, marks to `phases`."""
    plan = None
    mark = phases.mark if phases is not None else _nothing
    with phases.watch(model) if phases is not None else nullcontext():
        if isinstance(stream, RaggedBatches):
            batch = next(stream)
            losses, count, seconds = ragged_gradients(
                model, batch, stream.stream, config, processes, timeline
            )
            tokens, plan = batch.plan.tokens, PlanResult(batch.plan, processes.largest(seconds), batch.waited)
        else:
            losses, count, tokens = packed_gradients(model, stream, config, processes, timeline, reference)
    mark("clip")
    norm = clip_gradients(model, config.optimizer.clip)
    mark("optimizer")
    optimizer.step()
    optimizer.zero_grad()
    mark("")
    total, exposed, traffic = processes.sum(losses, *_communication(timeline))
    return StepResult(total / count, norm, exposed / traffic if traffic else None, tokens, plan)


def packed_gradients(
    model: Decoder,
    stream: Stream,
    config: TrainConfig,
    processes: Processes,
    timeline: Timeline | None = None,
    reference: Decoder | None = None,
) -> tuple[float, int, int]:
    """Backward passes of a global batch of sequences.

    Returns the sum of this rank's losses, what they are a mean over on all ranks (at least 1), and the tokens.
    """
    batches = list(own_sequences(stream, config.training.global_batch, processes))
    tokens = sum(b.tokens.shape[1] for b in batches) if processes.sequence_rank == 0 else 0
    count, tokens = processes.sum(units(batches, config, processes), tokens)
    count, losses = max(int(count), 1), 0.0
    for i, batch in enumerate(batches):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(i == len(batches) - 1)
        loss = sequence_loss(model, batch, config, processes, reference, timeline)
        # FSDP averages gradients over all processes; what is wanted is their sum over the count
        (loss * (processes.world_size / count)).backward()
        losses += float(loss.detach())
    return losses, count, int(tokens)


@torch.no_grad()
def evaluate(
    model: Decoder,
    stream: Stream | RaggedBatches,
    config: TrainConfig,
    processes: Processes,
    reference: Decoder | None = None,
) -> float:
    """Mean loss on the next `evaluate_batches` global batches of a stream."""
    batches = config.training.evaluate_batches
    losses, count = 0.0, 0
    if isinstance(stream, RaggedBatches):
        for _ in range(batches):
            more, counted = ragged_losses(model, next(stream), stream.stream, config, processes)
            losses, count = losses + more, count + counted
    else:
        for batch in own_sequences(stream, batches * config.training.global_batch, processes):
            losses += float(sequence_loss(model, batch, config, processes, reference))
            count += units([batch], config, processes)
    losses, count = processes.sum(losses, count)
    return losses / max(count, 1)


def sequence_loss(
    model: Decoder,
    batch: Batch,
    config: TrainConfig,
    processes: Processes,
    reference: Decoder | None = None,
    timeline: Timeline | None = None,
) -> Tensor:
    """This process's part of the loss of a sequence, summed over its `units`; what objective is the configuration's."""
    objective, loss = config.loss.objective, config.loss
    head_tokens = config.memory.head_tokens
    batch = batch.padded(2 * processes.sequence_size)
    forward, labels, values = _local(batch, model.config, config, processes, timeline)
    if objective in ("pretrain", "sft"):
        return forward(model, lambda h, head: token_loss(h, head.weight, labels, head_tokens)[0])
    frozen = torch.zeros(labels.shape, device=labels.device)
    if reference is not None:
        with torch.no_grad():
            frozen = forward(reference, lambda h, head: token_logprobs(h, head.weight, labels, head_tokens))
    if objective == "dpo":
        sign = values["sign"]
        margin = forward(
            model, lambda h, head: streamed_sum(h, head.weight, labels, signed_sum, (sign,), head_tokens)
        )
        own = float(margin.detach()) - float(signed_sum(frozen, sign))
        total = processes.sum_of_replica(own)
        return preference(margin, own, total, loss.beta, processes.sequence_size)
    old = torch.where(values["old"].isnan(), frozen, values["old"])
    extras = (old, frozen, values["advantage"], values["weight"])
    group = partial(group_policy, clip=loss.clip, kl=loss.kl)
    return forward(model, lambda h, head: streamed_sum(h, head.weight, labels, group, extras, head_tokens))


def units(batches: list[Batch], config: TrainConfig, processes: Processes) -> int:
    """What the loss is a mean over, as far as this process counts it: tokens, or pairs (dpo) or groups (grpo)."""
    if processes.sequence_rank != 0:  # the others hold the same sequences
        return 0
    if config.loss.objective in ("dpo", "grpo"):
        return len(batches)
    return sum(int((batch.labels != IGNORE).sum()) for batch in batches)


def own_sequences(stream: Stream, n: int, processes: Processes) -> Iterator[Batch]:
    """This replica's share of the next n sequences of the stream; every rank advances by all n."""
    for i in range(n):
        if i % processes.data_size == processes.data_rank:
            yield next(stream)
        else:
            stream.skip(1)


def shard(model: Decoder, config: TrainConfig, processes: Processes, frozen: bool = False) -> Decoder:
    """The model on its device, its state spread over all processes by FSDP2, layer by layer; frozen: never trained.

    Raises ValueError for bfloat16 without a GPU.
    """
    if config.training.precision == "bfloat16" and processes.device.type == "cpu":
        raise ValueError("training.precision = bfloat16 needs a GPU (CPUs are far slower at it); use auto")
    model = model.to(processes.device).requires_grad_(not frozen)
    if processes.state is None:
        return model
    policy = MixedPrecisionPolicy()
    if computes_in_half(config, processes):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=processes.state, mp_policy=policy)
    # the trained model's head and embedding stay gathered from the forward to the backward pass
    fully_shard(model, mesh=processes.state, mp_policy=policy, reshard_after_forward=True if frozen else None)
    return model


# ---- helpers -----------------------------------------------------------------------------------------
def _local(
    batch: Batch, shape: ModelConfig, config: TrainConfig, processes: Processes, timeline: Timeline | None
) -> tuple[Callable[[Decoder, UseHidden], Any], Tensor, dict[str, Tensor]]:
    """A function that runs a model over this process's tokens of a sequence; their labels and values."""
    rank, size, device = processes.sequence_rank, processes.sequence_size, processes.device
    layout = SequenceLayout(config.parallel.layout, batch.tokens.shape[1], size, tuple(batch.documents))

    def shared(x: Tensor, where: SequenceLayout) -> Tensor:
        return where.shard(x, rank).to(device)

    first, last = (layer_layouts(shape, layout)[i] for i in (0, -1))
    tokens, labels = shared(batch.tokens, first), shared(batch.labels, last)
    values = {name: shared(x, last) for name, x in batch.values.items()}

    def run(model: Decoder, use: UseHidden) -> Any:
        mixed = mixing(shape, config.parallel, layout, processes.sequence, timeline)
        masks = [AttentionMask(window=shape.window(i), documents=layout.documents) for i in shape.layers]
        tier = PinnedHost.of(device) if device.type == "cuda" else None
        runs = layer_runs(config.memory.policy, len(masks), masks if size == 1 else None, tier)
        positions = mixed.positions.position_ids(rank).to(device)
        with precision(config, processes):
            return model(tokens, positions, mixed.attends, run=runs, use=use, moves=mixed.moves)

    return run, labels, values


def _nothing(_: str) -> None:
    pass


def _communication(timeline: Timeline | None) -> tuple[float, float]:
    """Seconds of communication in which nothing was computed, and all seconds of communication."""
    if timeline is None or not timeline.spans:
        return 0.0, 0.0
    seconds = [timeline.categories(rank) for rank in timeline.ranks]
    exposed = sum(s["exposed"] for s in seconds)
    return exposed, exposed + sum(s["hidden"] for s in seconds)
