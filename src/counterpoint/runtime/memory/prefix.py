"""Attention of some queries of a sequence to the keys before them, in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from counterpoint.kernels import blocks
from counterpoint.kernels.mask import Area, AttentionMask
from counterpoint.kernels.tokens import Run, Tokens


def seen(mask: AttentionMask, first: int, stop: int) -> tuple[int, int, tuple[Area, ...]]:
    """The keys that queries first..stop (exclusive) of a sequence see, (first key, stop), and the areas in between."""
    q = Tokens((Run(first, stop - first),))
    areas = mask.areas(q, Tokens((Run(0, stop),)))
    low = min((a.k_start for a in areas), default=first)
    return low, stop, mask.areas(q, Tokens((Run(low, stop - low),)))


def attend(q: Tensor, k: Tensor, v: Tensor, areas: tuple[Area, ...]) -> Tensor:
    """q (B, H, n, D), k and v (B, G, m, D) -> out (B, H, n, D) over the visible areas of the n x m block."""
    return _Attend.apply(q, k, v, areas)  # type: ignore[return-value]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, areas: tuple[Area, ...]) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = blocks.attend(q, k, v, areas)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.areas = areas
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        grads = blocks.attend_backward(dout.transpose(1, 2), q, k, v, out, lse, ctx.areas)
        return *(g.transpose(1, 2).to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None
