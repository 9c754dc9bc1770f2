"""One of the local processes on which exactness is checked."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from counterpoint.reproductions.bench import Case, LinearCase, Outcome, read_cases
from counterpoint.runtime.attention import attention
from counterpoint.runtime.linear import linear_attention
from counterpoint.schedule.timeline import Timeline
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.training.config import ParallelConfig
from counterpoint.training.launch import Worker
from counterpoint.training.mesh import open_processes


def run_cases(worker: Worker, plan: Path) -> None:
    """Run the cases of a plan; rank 0 leaves their outcomes in `outcomes.json` next to it.

    A case with fewer ranks than there are processes is run by several groups of them at once.
    """
    torch.set_num_threads(1)
    n = worker.world_size
    outcomes: list[Outcome] = []
    with open_processes(ParallelConfig.model_validate({"data": 1, "sequence": (n,)}), worker) as processes:
        meshes: dict[int, DeviceMesh] = {}
        for case in read_cases(plan):
            size = case.ranks
            if size not in meshes:
                both = init_device_mesh("cpu", (n // size, size), mesh_dim_names=("copy", "sequence"))
                meshes[size] = both["sequence"]
            run = attend if isinstance(case, Case) else attend_linearly
            everyone = processes.gather(run(case, meshes[size], worker.rank % size))  # type: ignore[arg-type]
            if worker.rank == 0:
                outcomes.append(
                    Outcome(
                        max(difference for difference, _, _ in everyone),
                        sum(nbytes for _, nbytes, _ in everyone[:size]),
                        sum(nbytes for _, _, nbytes in everyone[:size]),
                    )
                )
        dist.barrier()
    if worker.rank == 0:
        plan.with_name("outcomes.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes]))


def attend(case: Case, mesh: DeviceMesh, rank: int) -> tuple[float, int, int]:
    """This rank's worst difference from one process, and the bytes it sent forward and backward."""
    layout = SequenceLayout(case.layout, case.tokens, case.ranks)
    random = torch.Generator().manual_seed(case.tokens)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    dtype = getattr(torch, case.dtype)
    q, k, v, dout = (
        torch.randn(case.batch, n, case.tokens, case.head_dim, generator=random, dtype=dtype) for n in heads
    )
    expected = one_process(q, k, v, dout, case.causal)
    timeline = Timeline()
    local = [layout.shard(x, rank, 2).requires_grad_() for x in (q, k, v)]
    out = attention(
        *local, mesh=mesh, layout=layout, causal=case.causal, forward=case.strategy, timeline=timeline
    )
    forward = timeline.bytes_sent(rank)
    out.backward(layout.shard(dout, rank, 2))
    backward = timeline.bytes_sent(rank) - forward
    got = [out.detach(), *(x.grad for x in local if x.grad is not None)]
    apart = [
        float((a - layout.shard(b, rank, 2)).abs().max() / b.abs().max())
        for a, b in zip(got, expected, strict=True)
    ]
    return max(apart), forward, backward


def one_process(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> list[Tensor]:
    """out, dq, dk, dv of torch's own attention over the whole sequence."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


def attend_linearly(case: LinearCase, mesh: DeviceMesh, rank: int) -> tuple[float, int, int]:
    """This rank's worst difference from the recurrence in one process, and the bytes it sent forward and backward."""
    layout, width = case.problem().layout, case.problem().shape.decay_width
    random = torch.Generator().manual_seed(case.tokens)
    dtype = getattr(torch, case.dtype)

    def made(dim: int) -> Tensor:
        return torch.randn(case.batch, case.heads, case.tokens, dim, generator=random, dtype=dtype)

    whole = [made(case.key_dim), made(case.key_dim), made(case.value_dim)]
    if width:
        whole.append(torch.nn.functional.logsigmoid(made(width)))
    dout = made(case.value_dim)
    inputs = [x.clone().requires_grad_() for x in whole]
    out = recurrence(*inputs, documents=case.documents, causal=case.causal)
    expected = [out.detach(), *torch.autograd.grad(out, inputs, dout)]
    timeline = Timeline()
    local = [layout.shard(x, rank, 2).requires_grad_() for x in whole]
    gates = [x.squeeze(-1) if width == 1 else x for x in local[3:]]
    got = linear_attention(
        *local[:3],
        *gates,
        mesh=mesh,
        layout=layout,
        causal=case.causal,
        forward=case.strategy,
        timeline=timeline,
    )
    forward = timeline.bytes_sent(rank)
    got.backward(layout.shard(dout, rank, 2))
    backward = timeline.bytes_sent(rank) - forward
    found = [got.detach(), *(x.grad for x in local if x.grad is not None)]
    apart = [
        float((a - layout.shard(b, rank, 2)).abs().max() / b.abs().max())
        for a, b in zip(found, expected, strict=True)
    ]
    return max(apart), forward, backward


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, documents: tuple[int, ...], causal: bool
) -> Tensor:
    """Linear attention token by token, (B, H, S, D): S_t = e^g_t S_(t-1) + k_t v_t^T, o_t = q_t S_t."""
    starts = {0, *accumulate(documents)}
    decay = torch.ones_like(k) if g is None else g.exp().expand(k.shape)
    empty = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
    outs: list[Tensor] = []
    state = empty
    for t in range(q.shape[2]):
        state = empty if t in starts else state * decay[:, :, t, :, None]
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append((q[:, :, t, None] @ state).squeeze(2))
    state = empty
    for t in () if causal else range(q.shape[2] - 1, -1, -1):
        state = empty if t + 1 in starts else state
        outs[t] = outs[t] + (q[:, :, t, None] @ state).squeeze(2)
        state = (state + k[:, :, t, :, None] * v[:, :, t, None, :]) * decay[:, :, t, :, None]
    return torch.stack(outs, 2)
