"""A whole linear attention: the plain recurrence in one process, and a run of the schedules on ranks in threads."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from counterpoint.schedule.check import check
from counterpoint.schedule.schedule import Schedule
from counterpoint.schedule.timeline import Timeline
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.strategies.sequence.linear import LinearProblem, parse_linear
from counterpoint.strategies.sequence.linear_builder import LinearShape
from support import reference
from support.ranks import run_ranks


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    documents: tuple[int, ...] = (),
    causal: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """Token by token, (B, S, H, D): S_t = a_t S_(t-1) + k_t v_t^T, o_t = q_t S_t; g = log a (B, S, H, 1 or D)."""
    starts = {0, *accumulate(documents)}
    tokens = q.shape[1]
    decay = torch.ones_like(k) if g is None else g.exp().expand(k.shape)
    empty = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    outs, state = [], empty
    for t in range(tokens):
        state = empty if t in starts else state * decay[:, t, :, :, None]
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outs.append((q[:, t, :, :, None] * state).sum(2))
    state = empty
    for t in reversed(range(tokens)) if not causal else ():
        state = empty if t + 1 in starts else state
        outs[t] = outs[t] + (q[:, t, :, :, None] * state).sum(2)
        state = (state + k[:, t, :, :, None] * v[:, t, :, None, :]) * decay[:, t, :, :, None]
    return scale * torch.stack(outs, 1)


@dataclass(frozen=True, slots=True)
class LinearCase:
    """Everything that tells one run from another; defaults are the plainest one."""

    ranks: int = 4
    tokens: int = 24
    decay: str = "none"
    forward: str = "states"
    backward: str | None = None
    causal: bool = True
    documents: tuple[int, ...] = ()
    batch: int = 1
    heads: int = 2
    key_dim: int = 4
    value_dim: int = 3
    dtype: str = "float64"
    scale: float = 1.0
    strength: float = 1.0  # how strong decays are: log decays go down to about -3 of it

    def problem(self) -> LinearProblem:
        shape = LinearShape(
            self.batch,
            self.heads,
            self.key_dim,
            self.value_dim,
            self.decay,
            self.dtype,
            self.scale,  # type: ignore[arg-type]
        )
        layout = SequenceLayout("contiguous", self.tokens, self.ranks, self.documents)
        return LinearProblem(
            shape,
            layout,
            parse_linear(self.forward),
            parse_linear(self.backward or self.forward),
            self.causal,
        )

    def schedules(self) -> tuple[list[Schedule], list[Schedule]]:
        """Forward and backward schedules of every rank, checked."""
        problem, ranks = self.problem(), range(self.ranks)
        forward = [problem.schedule("forward", rank) for rank in ranks]
        backward = [problem.schedule("backward", rank) for rank in ranks]
        check(forward)
        check(backward)
        return forward, backward

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """q, k, v, g, dout of the whole sequence, (B, S, H, ...)."""
        random = torch.Generator().manual_seed(seed)
        shape, dtype = self.problem().shape, getattr(torch, self.dtype)

        def made(dim: int) -> Tensor:
            size = (self.batch, self.tokens, self.heads, dim)
            return torch.randn(size, generator=random, dtype=torch.float64).to(dtype)

        found = {"q": made(self.key_dim), "k": made(self.key_dim), "v": made(self.value_dim)}
        if shape.decay_width:
            gates = torch.rand(
                self.batch, self.tokens, self.heads, shape.decay_width, generator=random
            ).double()
            found["g"] = (gates.clamp(min=1e-3).log() * self.strength).to(getattr(torch, shape.state.dtype))
        return found | {"dout": made(self.value_dim)}


@dataclass(slots=True)
class LinearOutcome:
    """Errors by name, schedules and timelines of both passes."""

    errors: dict[str, float]
    schedules: tuple[list[Schedule], list[Schedule]]
    timelines: tuple[list[Timeline], list[Timeline]] = field(default_factory=lambda: ([], []))

    @property
    def worst(self) -> float:
        return max(self.errors.values())


def run_linear(case: LinearCase, seed: int = 0) -> LinearOutcome:
    """Run both passes on ranks in threads, and compare with the recurrence and its gradients in float64."""
    problem, ranks = case.problem(), range(case.ranks)
    forward, backward = case.schedules()
    whole = case.tensors(seed)
    given = [{name: problem.layout.shard(x, rank) for name, x in whole.items()} for rank in ranks]
    before = [{name: x.clone() for name, x in shard.items()} for shard in given]
    lines = ([Timeline() for _ in ranks], [Timeline() for _ in ranks])
    made = run_ranks(forward, given, lines[0])
    grads = run_ranks(backward, [{**x, **y} for x, y in zip(given, made, strict=True)], lines[1])
    for shard, kept in zip(given, before, strict=True):
        assert all(torch.equal(shard[name], kept[name]) for name in shard), (
            "the caller's tensors were written to"
        )

    names = [name for name in ("q", "k", "v", "g") if name in whole]
    inputs = [whole[name].double().requires_grad_() for name in names]
    out = recurrence(
        *inputs[:3], inputs[3] if len(inputs) > 3 else None, case.documents, case.causal, case.scale
    )
    expected = dict(
        zip(
            [f"d{name}" for name in names],
            torch.autograd.grad(out, inputs, whole["dout"].double(), allow_unused=True),
            strict=True,
        )
    )
    errors = {}
    for name, parts in (("out", made), *((name, grads) for name in expected)):
        like = out.detach() if name == "out" else expected[name]
        like = torch.zeros_like(whole["g"], dtype=torch.float64) if like is None else like
        empty = like.new_empty(like.shape[0], 0, *like.shape[2:])
        got = problem.layout.unshard([part[name].double() if name in part else empty for part in parts])
        errors[name] = reference.error(got, like, 0.1)
    return LinearOutcome(errors, (forward, backward), lines)
