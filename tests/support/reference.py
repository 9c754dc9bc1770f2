"""Attention in one process, in float64, with a mask written down pair by pair: what everything is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


def visible(tokens: int, causal: bool, window: int | None, documents: tuple[int, ...] = ()) -> Tensor:
    """Which key (column) each query (row) sees: (tokens, tokens) bool."""
    position = torch.arange(tokens)
    document = torch.bucketize(
        position, torch.tensor(list(accumulate(documents)), dtype=torch.int64), right=True
    )
    seen = document[:, None] == document[None, :]
    if causal:
        seen = seen & (position[None, :] <= position[:, None])
    if window is not None:
        seen = seen & ((position[:, None] - position[None, :]).abs() < window)
    return seen


@dataclass(frozen=True, slots=True)
class Attended:
    """(B, S, heads, D) results in float64; lse (B, S, H)."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, seen: Tensor, scale: float | None = None
) -> Attended:
    """torch's scaled_dot_product_attention and its gradients. q, dout (B, S, H, D); k, v (B, T, G, D); seen (S, T)."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    keys, values = (x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    queries = q.transpose(1, 2)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=scale).transpose(1, 2)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout.double())
    scores = queries @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    lse = scores.masked_fill(~seen, -torch.inf).logsumexp(-1).transpose(1, 2)
    return Attended(*(x.detach() for x in (out, lse, dq, dk, dv)))


def error(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """The larger of the relative error of the whole and that of the worst element against the largest one.

    floor: a size below which differences count as if the expected tensor were that large: a gradient that is exactly
    zero, such as dq where a query sees one key, comes out as rounding errors of the terms that cancel in it.
    """
    if not expected.numel():
        return 0.0
    assert got.shape == expected.shape, (got.shape, expected.shape)
    difference = got.double() - expected.double()
    whole = difference.norm() / expected.double().norm().clamp_min(floor * expected.numel() ** 0.5 + 1e-300)
    worst = difference.abs().max() / expected.double().abs().max().clamp_min(floor + 1e-300)
    return float("inf") if bool(difference.isnan().any()) else max(float(whole), float(worst))
