"""A whole attention problem: inputs, schedules of every rank, a run on ranks in threads, errors against one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from counterpoint.schedule.check import check
from counterpoint.schedule.schedule import Schedule
from counterpoint.schedule.timeline import Timeline
from counterpoint.strategies.sequence.attention import (
    AttentionProblem,
    backward_schedule,
    forward_schedule,
    parse_choices,
)
from counterpoint.strategies.sequence.blocks import AttentionShape
from counterpoint.strategies.sequence.layout import SequenceLayout
from support import reference
from support.ranks import run_ranks, traffic

Links = dict[tuple[int, int], int]  # (source, destination) -> bytes


@dataclass(frozen=True, slots=True)
class Case:
    """Everything that tells one attention run from another; defaults are the plainest one."""

    mesh: tuple[int, ...] = (4,)
    forward: str = "tokenring"
    backward: str | None = None
    heads: int = 4
    kv_heads: int = 4
    tokens: int = 32
    causal: bool = True
    window: int | None = None
    documents: tuple[int, ...] = ()
    layout: str = "zigzag"
    batch: int = 1
    head_dim: int = 8
    dtype: str = "float32"
    scale: float | None = None
    wants_lse: bool = False

    @property
    def world_size(self) -> int:
        return prod(self.mesh)

    def problem(self) -> AttentionProblem:
        layout = SequenceLayout(self.layout, self.tokens, self.world_size, self.documents)
        shape = AttentionShape(self.batch, self.heads, self.kv_heads, self.head_dim, self.dtype, self.scale)
        forward, backward = parse_choices(self.forward), parse_choices(self.backward or self.forward)
        return AttentionProblem(
            shape, layout, self.mesh, forward, backward, self.causal, self.window, self.wants_lse
        )

    def schedules(self) -> tuple[list[Schedule], list[Schedule]]:
        """Forward and backward schedules of every rank, checked."""
        problem = self.problem()
        forward = [forward_schedule(problem, rank) for rank in range(self.world_size)]
        backward = [backward_schedule(problem, rank) for rank in range(self.world_size)]
        check(forward)
        check(backward)
        return forward, backward

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """q, k, v, dout of the whole sequence, (B, S, heads, D)."""
        random = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, self.dtype)

        def made(heads: int) -> Tensor:
            return torch.randn(
                self.batch, self.tokens, heads, self.head_dim, generator=random, dtype=torch.float64
            ).to(dtype)

        return {
            "q": made(self.heads),
            "k": made(self.kv_heads),
            "v": made(self.kv_heads),
            "dout": made(self.heads),
        }


@dataclass(slots=True)
class Outcome:
    """What a run gave: errors by name, bytes by link as counted by the transports, timelines by rank."""

    errors: dict[str, float]
    schedules: tuple[list[Schedule], list[Schedule]]
    sent: tuple[Links, Links]
    received: tuple[Links, Links]
    timelines: tuple[list[Timeline], list[Timeline]] = field(default_factory=lambda: ([], []))

    @property
    def worst(self) -> float:
        return max(self.errors.values())


def run_case(case: Case, seed: int = 0) -> Outcome:
    """Run forward and backward of a case on ranks in threads, and compare with one process."""
    forward, backward = case.schedules()
    layout, world_size = case.problem().layout, case.world_size
    whole = case.tensors(seed)
    shards = [{name: layout.shard(x, rank) for name, x in whole.items()} for rank in range(world_size)]
    given = [{name: x.clone() for name, x in shard.items()} for shard in shards]
    lines = ([Timeline() for _ in range(world_size)], [Timeline() for _ in range(world_size)])

    before = traffic(world_size)
    made = run_ranks(forward, given, lines[0])
    between = traffic(world_size)
    known = [{**inputs, **outputs} for inputs, outputs in zip(given, made, strict=True)]
    grads = run_ranks(backward, known, lines[1])
    after = traffic(world_size)
    for shard, inputs in zip(shards, given, strict=True):
        assert all(torch.equal(shard[name], inputs[name]) for name in shard), (
            "the caller's tensors were written to"
        )

    seen = reference.visible(case.tokens, case.causal, case.window, case.documents)
    expected = reference.attention(whole["q"], whole["k"], whole["v"], whole["dout"], seen, case.scale)
    results = {"out": made, "dq": grads, "dk": grads, "dv": grads}
    if all("lse" in outputs for rank, outputs in enumerate(made) if layout.local_tokens(rank)):
        results["lse"] = made
    errors = {}
    for name, parts in results.items():
        whole_part = join(layout, parts, name, getattr(expected, name))
        errors[name] = reference.error(whole_part, getattr(expected, name), 0.0 if name == "out" else 0.1)
    return Outcome(
        errors,
        (forward, backward),
        (_gained(before[0], between[0]), _gained(between[0], after[0])),
        (_gained(before[1], between[1]), _gained(between[1], after[1])),
        lines,
    )


def join(layout: SequenceLayout, parts: list[dict[str, Tensor]], name: str, like: Tensor) -> Tensor:
    """A result of all ranks as one tensor; ranks without tokens return nothing."""
    empty = like.new_empty(like.shape[0], 0, *like.shape[2:])
    dtype = next(part[name].dtype for part in parts if name in part)
    return layout.unshard([part[name] if name in part else empty.to(dtype) for part in parts])


def planned(schedules: list[Schedule]) -> Links:
    """The bytes by link that schedules say they send."""
    return {(s.rank, to): n for s in schedules for to, n in s.sent_bytes().items()}


def _gained(before: Links, after: Links) -> Links:
    return {link: n - before.get(link, 0) for link, n in sorted(after.items()) if n > before.get(link, 0)}
