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
from counterpoint.planner.group_cost import Share

STATE = "gathering and reducing state"
COPIES = "copies to and from the host"


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
    nothing hides. memory_bytes: on the fullest rank, state included. shares: of every type of layers and of all else,
    which add up to compute and communication; bytes are those of the layers' messages, without gathered state.
    """

    seconds: float
    compute: float
    communication: float
    idle: float
    memory_bytes: float
    tokens_per_second: float
    shares: tuple[Share, ...] = ()
    bars: tuple[Bar, ...] = ()

    @property
    def sent_bytes(self) -> float:
        """Bytes that a rank sends for its layers, mean."""
        return sum(share.sent_bytes for share in self.shares)

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        found.pop("bars")
        return {**found, "sent_bytes": self.sent_bytes}


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


def group_shares(plan: BatchPlan, group: Group, cost: BatchCost) -> list[Share]:
    """What a group's time consists of, copies to and from the host that outlast computing included."""
    shares = cost.group(group.ranks).shares([plan.lengths[i] for i in group.sequences])
    if group.offload:
        compute = sum(share.compute for share in shares)
        tokens = tokens_of(plan, group) / len(group.ranks)
        copies = cost.offload_seconds(tokens, group.offload, compute)
        shares.append(Share(COPIES, 1, 0.0, copies, 0.0))
    return shares


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
    account = _Account(plan, cost)
    for number, micro_batch in enumerate(plan.micro_batches):
        longest, busy = state, 0
        for group in micro_batch.groups:
            longest = max(longest, account.add(number, group, now, state))
            busy += len(group.ranks)
        account.wait(state, plan.world_size - busy)
        now += longest
    return account.prediction(now)


def _free(plan: BatchPlan, cost: BatchCost) -> Prediction:
    free = [0.0] * plan.world_size
    account = _Account(plan, cost)
    for number, micro_batch in enumerate(plan.micro_batches):
        for group in micro_batch.groups:
            start = max(free[rank] for rank in group.ranks)
            stop = start + account.add(number, group, start)
            for rank in group.ranks:
                free[rank] = stop
    state = cost.state_seconds * (1 if cost.state == "zero1" else len(plan.micro_batches))
    account.wait(state, plan.world_size)
    return account.prediction(max(free) + state)


class _Account:
    """Adds up what groups take, in seconds and bytes of all their ranks together."""

    def __init__(self, plan: BatchPlan, cost: BatchCost) -> None:
        self.plan, self.cost = plan, cost
        self.bars: list[Bar] = []
        self.shares: dict[str, Share] = {}

    def add(self, micro_batch: int, group: Group, start: float, state: float = 0.0) -> float:
        """A group's work from `start` on, which hides up to as much gathering of state; its seconds."""
        shares = group_shares(self.plan, group, self.cost)
        compute = sum(share.compute for share in shares)
        if state > compute:
            shares.append(Share(STATE, 1, 0.0, state - compute, 0.0))
        for share in shares:
            self._add(share, len(group.ranks))
        communication = sum(share.communication for share in shares)
        self.bars.append(Bar(micro_batch, group, start, compute, communication))
        return compute + communication

    def wait(self, state: float, ranks: int) -> None:
        """Gathering of state on ranks that have nothing to compute meanwhile."""
        if state and ranks:
            self._add(Share(STATE, 1, 0.0, state, 0.0), ranks)

    def _add(self, share: Share, ranks: int) -> None:
        old = self.shares.get(share.name, Share(share.name, share.times, 0.0, 0.0, 0.0))
        self.shares[share.name] = Share(
            share.name,
            share.times,
            old.compute + ranks * share.compute,
            old.communication + ranks * share.communication,
            old.sent_bytes + ranks * share.sent_bytes,
        )

    def prediction(self, seconds: float) -> Prediction:
        n, plan = self.plan.world_size, self.plan
        shares = tuple(
            Share(s.name, s.times, s.compute / n, s.communication / n, s.sent_bytes / n)
            for s in self.shares.values()
        )
        compute, communication = sum(s.compute for s in shares), sum(s.communication for s in shares)
        idle = max(0.0, seconds - compute - communication)
        rate = plan.tokens / seconds if seconds else 0.0
        memory = _memory(plan, self.cost)
        return Prediction(seconds, compute, communication, idle, memory, rate, shares, tuple(self.bars))
