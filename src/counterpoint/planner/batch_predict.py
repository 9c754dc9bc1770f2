"""What a plan of a ragged batch takes: the same prediction for every solver's plan.

With sharded state (zero3) all ranks end a micro-batch together, and gathering the state runs behind computing as far as
that lasts. Otherwise a group starts when all its ranks are free, and gradients are reduced once at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from counterpoint.planner.batch import BatchPlan, Group, check_lengths
from counterpoint.planner.batch_cost import BatchCost


@dataclass(frozen=True, slots=True)
class Bar:
    """A group's part of the batch: from `start` it computes, then (or between) waits for messages; seconds."""

    micro_batch: int
    group: Group
    start: float
    compute: float
    communication: float

    @property
    def stop(self) -> float:
        return self.start + self.compute + self.communication


@dataclass(frozen=True, slots=True)
class Prediction:
    """Time of a batch, forward and backward, and what it consists of, mean over ranks (seconds).

    compute + communication + idle = seconds. communication: messages, gathering of state and copies to the host that
    nothing hides. memory_bytes: on the fullest rank, state included. reserved: share of the memory not planned with.
    """

    seconds: float
    compute: float
    communication: float
    idle: float
    memory_bytes: float
    tokens_per_second: float
    bars: tuple[Bar, ...] = ()

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        found.pop("bars")
        return found


def predict(plan: BatchPlan, cost: BatchCost) -> Prediction:
    """The predicted time of a plan. Raises ValueError when a group's sequences do not fit its ranks' memory."""
    check_memory(plan, cost)
    return _synchronous(plan, cost) if plan.synchronous else _free(plan, cost)


def check_fits(lengths: Sequence[int], cost: BatchCost, offload: float = 0.0) -> None:
    """Raise ValueError for an empty batch, a length below 1, or a sequence that all ranks together cannot hold."""
    check_lengths(lengths)
    per_rank = cost.capacity_with(offload)
    room = cost.ranks * per_rank
    longest = max(range(len(lengths)), key=lambda i: lengths[i])
    if lengths[longest] > room:
        needed = -(-lengths[longest] // per_rank)
        raise ValueError(
            f"sequence {longest} has {lengths[longest]:,} tokens; {cost.ranks} ranks hold {per_rank:,} tokens each, "
            f"{room:,} in all: shorten it to that, use {needed:,} ranks or more, or keep less (recomputation)"
        )


def check_memory(plan: BatchPlan, cost: BatchCost) -> None:
    """Raise ValueError for a group that holds more tokens than its ranks have room for."""
    if plan.world_size > cost.ranks:
        raise ValueError(f"the plan is for {plan.world_size} ranks, the costs for {cost.ranks}")
    for number, micro_batch in enumerate(plan.micro_batches):
        for group in micro_batch.groups:
            tokens, room = tokens_of(plan, group), len(group.ranks) * cost.capacity_with(group.offload)
            if tokens > room:
                raise ValueError(
                    f"micro-batch {number}: {tokens:,} tokens for ranks {group.ranks[0]} to {group.ranks[-1]}, "
                    f"which hold {room:,}"
                )


def tokens_of(plan: BatchPlan, group: Group) -> int:
    return sum(plan.lengths[i] for i in group.sequences)


def group_seconds(plan: BatchPlan, group: Group, cost: BatchCost) -> tuple[float, float]:
    """(computing, exposed communication) of a group, copies to and from the host that outlast computing included."""
    compute, messages = cost.group(group.ranks).seconds([plan.lengths[i] for i in group.sequences])
    if group.offload:
        messages += cost.offload_seconds(tokens_of(plan, group) / len(group.ranks), group.offload, compute)
    return compute, messages


def _memory(plan: BatchPlan, cost: BatchCost) -> float:
    """Bytes on the fullest rank."""
    layers, fullest = cost.model.num_hidden_layers, 0.0
    for micro_batch in plan.micro_batches:
        for group in micro_batch.groups:
            away = group.offload * max(0, layers - 2) * cost.layer_bytes
            tokens = -(-tokens_of(plan, group) // len(group.ranks))
            fullest = max(fullest, tokens * (cost.token_bytes - away))
    return fullest + cost.state_bytes


def _synchronous(plan: BatchPlan, cost: BatchCost) -> Prediction:
    state, now = cost.state_seconds, 0.0
    computed = communicated = 0.0
    bars = []
    for number, micro_batch in enumerate(plan.micro_batches):
        longest, busy = state, 0
        for group in micro_batch.groups:
            compute, messages = group_seconds(plan, group, cost)
            messages += max(0.0, state - compute)
            bars.append(Bar(number, group, now, compute, messages))
            longest = max(longest, compute + messages)
            computed += len(group.ranks) * compute
            communicated += len(group.ranks) * messages
            busy += len(group.ranks)
        communicated += (plan.world_size - busy) * state
        now += longest
    return _prediction(plan, cost, now, computed, communicated, bars)


def _free(plan: BatchPlan, cost: BatchCost) -> Prediction:
    free = [0.0] * plan.world_size
    state = cost.state_seconds * (1 if cost.state == "zero1" else len(plan.micro_batches))
    computed, communicated = 0.0, plan.world_size * state
    bars = []
    for number, micro_batch in enumerate(plan.micro_batches):
        for group in micro_batch.groups:
            compute, messages = group_seconds(plan, group, cost)
            start = max(free[rank] for rank in group.ranks)
            bars.append(Bar(number, group, start, compute, messages))
            for rank in group.ranks:
                free[rank] = start + compute + messages
            computed += len(group.ranks) * compute
            communicated += len(group.ranks) * messages
    return _prediction(plan, cost, max(free) + state, computed, communicated, bars)


def _prediction(
    plan: BatchPlan, cost: BatchCost, seconds: float, computed: float, communicated: float, bars: list[Bar]
) -> Prediction:
    compute, communication = computed / plan.world_size, communicated / plan.world_size
    idle = max(0.0, seconds - compute - communication)
    rate = plan.tokens / seconds if seconds else 0.0
    return Prediction(seconds, compute, communication, idle, _memory(plan, cost), rate, tuple(bars))
