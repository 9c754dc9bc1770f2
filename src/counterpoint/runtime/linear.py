"""Linear attention over a sequence that is sharded over ranks, as one differentiable call."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from counterpoint.kernels.attention import accumulator
from counterpoint.kernels.kernel import torch_dtype
from counterpoint.runtime.engine import Engine
from counterpoint.runtime.group import Group, agreed_layout
from counterpoint.schedule.timeline import Timeline
from counterpoint.strategies.sequence.choices import Choice
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.strategies.sequence.linear import (
    LinearProblem,
    backward_schedule,
    forward_schedule,
    parse_linear,
)
from counterpoint.strategies.sequence.linear_builder import Decay, LinearShape

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    mesh: DeviceMesh | None = None,
    ranks: tuple[int, ...] | None = None,
    layout: SequenceLayout | None = None,
    causal: bool = True,
    scale: float = 1.0,
    forward: str | Choice = "states",
    backward: str | Choice | None = None,
    check: bool = True,
    timeline: Timeline | None = None,
    timeout: float = 300.0,
) -> Tensor:
    """Linear attention of this rank's queries to the tokens of all ranks; equal to one process's recurrence

        S_t = exp(log_decay_t) S_(t-1) + k_t v_t^T,   out_t = scale q_t S_t.

    q, k: (batch, heads, local_tokens, key_dim). v: (batch, heads, local_tokens, value_dim); out is shaped like v.
    log_decay: logarithms of decays between 0 and 1, so at most 0. None: no decay. (heads,): one fixed decay per head
    (retention); (batch, heads, local_tokens): one per head and token (Mamba-2); (batch, heads, local_tokens, key_dim):
    one per channel (gated linear attention). Gradients flow to all of them.

    mesh: a DeviceMesh over the ranks that share the sequence; None for a single process. layout: a contiguous one,
    whose documents reset the state; None: one document, for which the ranks tell each other their lengths. ranks: those
    of the mesh that share the sequence, when not all do; see `attention`. causal
    False: tokens see those behind them too, under the decays between. forward, backward: "states" (LASP-2, one gather
    of states) or "states_chain" (LASP-1), with options as in "states(wire_dtype=bfloat16)"; backward None: as forward.
    check: look whether log_decay is in range. timeline, timeout: as in `attention`.

    Raises ValueError for shapes, layouts, decays and strategies that do not fit, PeerFailure when a peer is lost.
    """
    engine = Engine.of(mesh, timeout=timeout)
    check_inputs(q, k, v, log_decay, check)
    dtype = str(q.dtype).removeprefix("torch.")
    decay, gates = _gates(log_decay, q, torch_dtype(accumulator(dtype)))
    group = Group.of(engine, ranks)
    layout = agreed_layout(group, "contiguous" if layout is None else layout, q.shape[2])
    choice = parse_linear(forward)
    problem = _problem(
        LinearShape(q.shape[0], q.shape[1], q.shape[3], v.shape[3], decay, dtype, scale),
        layout,
        choice,
        choice if backward is None else parse_linear(backward),
        causal,
    )
    return _LinearAttention.apply(q, k, v, gates, group, problem, timeline)  # type: ignore[no-any-return]


def check_inputs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, values: bool = True) -> None:
    """Raise ValueError unless the inputs of `linear_attention` fit together; values: look at those of log_decay."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must be (batch, heads, local_tokens, dim), got {shapes}")
    if q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"q and k must have one shape, and v may differ from it in its last dim only, got {shapes}; "
            "repeat keys and values that several heads share"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if log_decay is None:
        return
    allowed = [tuple(q.shape[1:2]), tuple(q.shape[:3]), tuple(q.shape)]
    if tuple(log_decay.shape) not in allowed or not log_decay.is_floating_point():
        raise ValueError(
            f"log_decay is {log_decay.dtype} {list(log_decay.shape)}; give floating numbers of shape "
            f"{' or '.join(str(list(shape)) for shape in allowed)} (per head, per token, per channel)"
        )
    if values and log_decay.numel() and not bool((log_decay <= 0).all()):
        worst = float("nan") if bool(log_decay.isnan().any()) else float(log_decay.max())
        raise ValueError(
            f"log_decay reaches {worst:g}, but it is the logarithm of a decay between 0 and 1 and must be at most 0; "
            "pass logsigmoid(x) or -softplus(x), or the log of a decay"
        )


def _gates(log_decay: Tensor | None, q: Tensor, dtype: torch.dtype) -> tuple[Decay, Tensor | None]:
    """The form of the decay, and log decays as schedules have them: (batch, heads, tokens, 1 or key_dim)."""
    if log_decay is None:
        return "none", None
    gates = log_decay.to(dtype)
    if gates.ndim == 1:
        gates = gates[None, :, None].expand(q.shape[:3])
    return ("vector", gates) if gates.ndim == 4 else ("scalar", gates.unsqueeze(-1))


@lru_cache(maxsize=256)
def _problem(*parts: Any) -> LinearProblem:
    """The same problem for the same arguments, so that layers do not check and hash it anew."""
    return LinearProblem(*parts)


class _LinearAttention(torch.autograd.Function):
    """Forward runs the forward schedule, backward the backward schedule, both on tensors with tokens before heads."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, gates, group: Group, problem: LinearProblem, timeline):
        tensors = {"q": q, "k": k, "v": v, **({} if gates is None else {"g": gates})}
        given = {name: x.detach().transpose(1, 2) for name, x in tensors.items()}
        made = group.engine.run(group.schedule(forward_schedule, problem), given, timeline)
        out = made.get("out", torch.empty_like(given["v"]))  # a rank without tokens has no outputs
        if any(ctx.needs_input_grad[:4]):
            known = {**given, **made}
            ctx.schedule = group.schedule(backward_schedule, problem)
            ctx.names = [v.name for v in ctx.schedule.inputs if v.name != "dout"]
            ctx.save_for_backward(*(known[name] for name in ctx.names))
            ctx.engine, ctx.timeline = group.engine, timeline
            ctx.shapes = [(x.shape, x.dtype, x.device) if x is not None else None for x in (q, k, v, gates)]
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, *grads: Any):
        if torch.is_grad_enabled():  # create_graph: messages are not part of the graph
            raise RuntimeError(
                "sharded linear attention cannot be differentiated twice: call backward without create_graph"
            )
        given = dict(zip(ctx.names, ctx.saved_tensors, strict=True)) | {"dout": grads[0].transpose(1, 2)}
        made = ctx.engine.run(ctx.schedule, given, ctx.timeline)
        results = []
        for name, like in zip(("dq", "dk", "dv", "dg"), ctx.shapes, strict=True):
            if like is None:
                results.append(None)
            elif name in made:
                results.append(made[name].transpose(1, 2))
            else:
                shape, dtype, device = like
                results.append(torch.zeros(shape, dtype=dtype, device=device))
        return *results, None, None, None
