"""Partial results of attention: merging them, what a backward needs of the output. Shapes as in `kernels.blocks`."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(x: Tensor) -> torch.dtype:
    """In which dtype partial results are merged and gradients are summed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Fold a partial result into (out, lse), in place: both become those of the union of their keys.

    out <- out - sigmoid(l - L) (out - part); L <- L - logsigmoid(L - l). Safe from overflow, and for rows with L or
    l -inf (no key seen yet).
    """
    weight = torch.sigmoid(part_lse - lse).nan_to_num_(0.0)
    torch.logaddexp(lse, part_lse, out=lse)
    out.lerp_(part.to(out.dtype), weight.unsqueeze(-1).to(out.dtype))


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """D = rowsum(dout * out), (B, S, H) in float32: what the softmax's backward needs of the output."""
    return torch.einsum("bshd,bshd->bsh", dout.to(accumulator(dout)), out.to(accumulator(out)))


def output_standing_in(dout: Tensor, delta: Tensor) -> Tensor:
    """An `out` with rowsum(dout * out) = delta.

    The flash kernels take out where the mathematics takes delta. Where only delta has travelled, this vector along
    dout serves them: delta dout / |dout|^2, with dout scaled to unit maximum first so that nothing overflows.
    """
    direction = dout.to(accumulator(dout))
    top = direction.abs().amax(-1, keepdim=True)
    unit = direction / top.clamp_min(torch.finfo(direction.dtype).tiny)
    length = unit.square().sum(-1, keepdim=True).clamp_min(1.0)
    factor = delta.unsqueeze(-1) / (length * top)
    return unit.mul_(factor.nan_to_num_(0.0, 0.0, 0.0)).to(dout.dtype)
