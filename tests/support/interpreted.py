"""What runs in Triton's interpreter: a case of attention with the Triton kernels, against one process in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from counterpoint.kernels import triton_attention
from counterpoint.kernels.mask import Area, AttentionMask, one_document
from counterpoint.kernels.triton_attention import Plan, Tiles
from support import reference

SMALL = Plan(Tiles(32, 16), Tiles(16, 32), Tiles(16, 32))


@dataclass(frozen=True)
class Case:
    """Sizes and mask; `areas` in place of a mask, for queries and keys that are not the same tokens."""

    tokens: int
    kv_heads: int = 1
    group: int = 1
    head_dim: int = 16
    causal: bool = True
    window: int | None = None
    documents: tuple[int, ...] = ()
    areas: tuple[Area, ...] | None = None
    keys: int | None = None
    dtype: str = "float32"
    plan: Plan = SMALL
    batch: int = 1
    from_delta: bool = False
    scale: float = 0.3
    heads_outside: bool = False  # memory order (B, H, S, D)
    repeat: bool = False  # and a second backward must give the same bits


def errors(case: Case) -> dict[str, float]:
    """Errors of out, lse, dq, dk and dv."""
    random = torch.Generator().manual_seed(1)
    dtype, keys = getattr(torch, case.dtype), case.keys or case.tokens

    def new(tokens: int, heads: int) -> torch.Tensor:
        x = torch.randn(case.batch, heads, tokens, case.head_dim, generator=random).to(dtype).transpose(1, 2)
        return x if case.heads_outside else x.contiguous()

    heads = case.kv_heads * case.group
    q, k, v, dout = (
        new(case.tokens, heads),
        new(keys, case.kv_heads),
        new(keys, case.kv_heads),
        new(case.tokens, heads),
    )
    areas = case.areas
    if areas is None:
        mask = AttentionMask(case.causal, case.window, case.documents)
        areas = mask.areas(one_document(case.tokens), one_document(keys))
    seen = torch.zeros(case.tokens, keys, dtype=torch.bool)
    for a in areas:
        ahead = torch.arange(a.columns) - torch.arange(a.rows)[:, None]
        block = torch.ones_like(ahead, dtype=torch.bool)
        block &= True if a.lo is None else ahead >= a.lo
        block &= True if a.hi is None else ahead <= a.hi
        seen[a.q_start : a.q_stop, a.k_start : a.k_stop] |= block
    blind = ~seen.any(1)  # softmax over nothing: kept out of the reference
    expected = reference.attention(
        q, k, v, dout.masked_fill(blind[:, None, None], 0), seen | blind[:, None], case.scale
    )
    expected.out[:, blind], expected.lse[:, blind] = 0, -torch.inf

    out, lse = triton_attention.forward(q, k, v, areas, case.scale, case.plan)
    row = (dout.float() * out.float()).sum(-1) if case.from_delta else out
    args = dout, q, k, v, row, lse, areas, case.scale, case.plan
    grads = triton_attention.backward(*args)
    if case.repeat:
        assert all(map(torch.equal, grads, triton_attention.backward(*args))), "two runs differ"
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert torch.equal(lse == -torch.inf, expected.lse == -torch.inf), "rows that see nothing"
    lse, expected_lse = lse.nan_to_num(neginf=0.0), expected.lse.nan_to_num(neginf=0.0)
    found = {"out": reference.error(out, expected.out), "lse": reference.error(lse, expected_lse, 1.0)}
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        assert grad.dtype == torch.float32
        found[name] = reference.error(grad, getattr(expected, name), 0.1)
    return found


def partial_errors(cut: int) -> dict[str, float]:
    """Keys in two parts, merged; the gradients of each part from the merged row's out and logsumexp, summed."""
    from counterpoint.kernels.blocks import merge

    random = torch.Generator().manual_seed(2)
    q, k, v, dout = (torch.randn(1, 40, 2, 16, generator=random) for _ in range(4))
    expected = reference.attention(q, k, v, dout, torch.ones(40, 40, dtype=torch.bool))
    out, lse = torch.zeros_like(q), torch.full((1, 40, 2), -torch.inf)
    halves = (slice(0, cut), slice(cut, 40))
    for half in halves:
        areas = (Area(0, 40, 0, half.stop - half.start),)
        merge(
            out, lse, *triton_attention.forward(q, k[:, half], v[:, half], areas, 0.25, SMALL, torch.float32)
        )
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for half in halves:
        areas = (Area(0, 40, 0, half.stop - half.start),)
        grads = triton_attention.backward(dout, q, k[:, half], v[:, half], out, lse, areas, 0.25, SMALL)
        dq += grads[0]
        dk[:, half], dv[:, half] = grads[1:]
    pairs = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return {name: reference.error(got, getattr(expected, name)) for name, got in pairs.items()}
