"""Exact attention over a sequence that is sharded over ranks, as one differentiable call."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from counterpoint.runtime.engine import Engine
from counterpoint.runtime.group import Group, agreed_layout
from counterpoint.schedule.schedule import Schedule
from counterpoint.schedule.timeline import Timeline
from counterpoint.strategies.sequence.attention import (
    AttentionProblem,
    Choices,
    backward_schedule,
    forward_schedule,
    parse_choices,
)
from counterpoint.strategies.sequence.blocks import AttentionShape
from counterpoint.strategies.sequence.layout import SequenceLayout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh | None = None,
    ranks: tuple[int, ...] | None = None,
    layout: SequenceLayout | str = "zigzag",
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    forward: Choices = "tokenring",
    backward: Choices | None = None,
    cached: SequenceLayout | None = None,
    return_lse: bool = False,
    timeline: Timeline | None = None,
    timeout: float = 300.0,
) -> Any:
    """Attention of this rank's queries over the keys of all ranks; equal to one process attending the whole sequence.

    q: (batch, heads, local_tokens, head_dim). k, v: (batch, kv_heads, local_tokens, head_dim), kv_heads dividing
    heads; they are never repeated, neither in memory nor on the wire. Returns out, shaped like q, and with return_lse
    also the logsumexp (batch, heads, local_tokens) in float32, which is not differentiable.

    mesh: a DeviceMesh over the ranks that share the sequence; None for a single process. layout: which rank holds
    which tokens (its documents make the mask block-diagonal), or the name of a layout of one document, for which the
    ranks tell each other their lengths at every call. window: keys less than so many positions away are seen.

    ranks: the ranks of the mesh that share the sequence, in the order of the layout's parts, when not all do; a
    SequenceLayout is then needed. Other ranks may share other sequences at the same time, and groups may change from
    call to call: all use the connections of the mesh. Ranks that meet in several groups must go through them in one
    order.

    forward, backward: "tokenring", "ring", "bidirectional_ring", "allgather", "ulysses" or "rsa", with options as
    in "tokenring(packets=4)"; on a mesh with several axes one per axis, outermost first: ("ring", "tokenring").
    backward None: the same as forward. cached: the layout of earlier tokens whose keys and values are at hand; the
    new tokens follow them, and k and v hold this rank's cached tokens first, then its new ones. timeline: what
    happens is appended to it. timeout: seconds until a peer that does not answer counts as lost (read when a mesh
    is first used).

    Raises ValueError for shapes, layouts and strategies that do not fit, PeerFailure when a peer is lost.
    """
    engine = Engine.of(mesh, timeout=timeout)
    group = Group.of(engine, ranks)
    check_inputs(q, k, v, 0 if cached is None else cached.local_tokens(group.place))
    layout = agreed_layout(group, layout, q.shape[2])
    dtype = str(q.dtype).removeprefix("torch.")
    problem = _problem(
        AttentionShape(q.shape[0], q.shape[1], k.shape[1], q.shape[3], dtype, scale),
        layout,
        group.shape,
        _per_axis(parse_choices(forward), group.shape),
        _per_axis(parse_choices(forward if backward is None else backward), group.shape),
        causal,
        window,
        return_lse,
        cached,
    )
    out, lse = _Attention.apply(q, k, v, group, problem, timeline)  # type: ignore[misc]
    return (out, lse) if return_lse else out


def check_inputs(q: Tensor, k: Tensor, v: Tensor, cached: int = 0) -> None:
    """Raise ValueError unless the shapes and dtypes of q, k and v, with so many cached keys, can be attended."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must be (batch, heads, local_tokens, head_dim), got {shapes}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape, got {shapes}")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"q and k may differ only in their number of heads (dim 1), got {shapes}")
    if q.shape[2] + cached != k.shape[2]:
        behind = f" behind {cached} cached ones" if cached else ""
        raise ValueError(f"k must hold the {q.shape[2]} tokens of q{behind}, got {shapes}")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"the {q.shape[1]} heads of q must be a multiple of the {k.shape[1]} heads of k and v"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")


@lru_cache(maxsize=256)
def _problem(*parts: Any) -> AttentionProblem:
    """The same problem for the same arguments, so that layers do not check and hash it anew."""
    return AttentionProblem(*parts)


def _per_axis(choices: tuple, shape: tuple[int, ...]) -> tuple:
    # On a single rank every strategy is the kernel alone, however many axes were meant.
    return choices[:1] if shape == (1,) else choices


class _Attention(torch.autograd.Function):
    """Forward runs the forward schedule, backward the backward schedule, both on tensors with tokens before heads."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, group: Group, problem: AttentionProblem, timeline):
        given = {name: _tokens_first(x) for name, x in (("q", q), ("k", k), ("v", v))}
        made = group.engine.run(group.schedule(forward_schedule, problem), given, timeline)
        out = made.get("out", torch.empty_like(given["q"]))  # a rank without tokens has no outputs
        if any(ctx.needs_input_grad[:3]):
            known = {**given, **made, "out": out}
            ctx.schedule = group.schedule(backward_schedule, problem)
            ctx.names = [v.name for v in ctx.schedule.inputs if v.name != "dout"]
            ctx.save_for_backward(*(known[name] for name in ctx.names))
            ctx.engine, ctx.timeline = group.engine, timeline
            ctx.shapes = [(x.shape, x.dtype, x.device) for x in (q, k, v)]
        lse = made["lse"].transpose(1, 2) if "lse" in made and problem.wants_lse else None
        if lse is None and problem.wants_lse:
            lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        if lse is not None:
            ctx.mark_non_differentiable(lse)
        return out.transpose(1, 2), lse

    @staticmethod
    def backward(ctx, *grads: Any):
        if (
            torch.is_grad_enabled()
        ):  # create_graph: messages are not part of the graph, so terms would be missing
            raise RuntimeError(
                "sharded attention cannot be differentiated twice: call backward without create_graph"
            )
        schedule: Schedule = ctx.schedule
        given = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        if any(v.name == "dout" for v in schedule.inputs):
            given["dout"] = _tokens_first(grads[0])
        made = ctx.engine.run(schedule, given, ctx.timeline)
        results = []
        for name, (shape, dtype, device) in zip(("dq", "dk", "dv"), ctx.shapes, strict=True):
            grad = (
                made[name].transpose(1, 2) if name in made else torch.zeros(shape, dtype=dtype, device=device)
            )
            results.append(grad)
        return *results, None, None, None


def _tokens_first(x: Tensor) -> Tensor:
    """(batch, heads, tokens, head_dim) -> (batch, tokens, heads, head_dim), with a dense last dim as kernels want."""
    x = x.detach().transpose(1, 2)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
