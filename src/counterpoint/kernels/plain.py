"""Plain attention with materialised scores, in strips of queries: for any device and dtype, and to compare others with.

Shapes here have heads first: q, out, dout (B, H, S, D); k, v (B, G, T, D); lse (B, H, S). Computed in float32, or in
float64 for float64 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 1024  # queries of a strip


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float, rows: int = ROWS
) -> tuple[Tensor, Tensor]:
    """(out, lse). bias: additive, (S, T)."""
    values, outs, lses = _wide(v), [], []
    for i in range(0, q.shape[2], rows):
        scores = _scores(q[:, :, i : i + rows], k, i, causal, bias, scale)
        lse = scores.logsumexp(-1)
        p = torch.exp(scores - lse.unsqueeze(-1))
        outs.append((_grouped(p, v) @ values.unsqueeze(2)).flatten(1, 2).to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    bias: Tensor | None,
    scale: float,
    rows: int = ROWS,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the accumulator's dtype, given out and lse of the whole rows."""
    dout, keys, values = _wide(dout), _wide(k), _wide(v)
    dq, dk, dv = [], torch.zeros_like(keys), torch.zeros_like(values)
    delta = (dout * _wide(out)).sum(-1, keepdim=True)
    for i in range(0, q.shape[2], rows):
        part = slice(i, i + rows)
        p = torch.exp(_scores(q[:, :, part], k, i, causal, bias, scale) - lse[:, :, part].unsqueeze(-1))
        dp = (_grouped(dout[:, :, part], v) @ values.transpose(-1, -2).unsqueeze(2)).flatten(1, 2)
        ds = p * (dp - delta[:, :, part])
        dv += (_grouped(p, v).transpose(-1, -2) @ _grouped(dout[:, :, part], v)).sum(2)
        dk += scale * (_grouped(ds, k).transpose(-1, -2) @ _grouped(_wide(q[:, :, part]), k)).sum(2)
        dq.append(scale * (_grouped(ds, k) @ keys.unsqueeze(2)).flatten(1, 2))
    return torch.cat(dq, 2), dk, dv


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _grouped(x: Tensor, kv: Tensor) -> Tensor:
    """(B, H, S, *) -> (B, G, H / G, S, *), so that a key/value head meets its query heads without being repeated."""
    return x.unflatten(1, (kv.shape[1], -1))


def _scores(q: Tensor, k: Tensor, first: int, causal: bool, bias: Tensor | None, scale: float) -> Tensor:
    scores = (_grouped(_wide(q), k) @ _wide(k).transpose(-1, -2).unsqueeze(2)).flatten(1, 2) * scale
    if bias is not None:
        scores = scores + bias[first : first + q.shape[2]]
    if causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(first)
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores
