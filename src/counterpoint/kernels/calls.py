"""Areas of a block as calls of kernels that know full and causal blocks, and a bias or a window.

Such a kernel works on heads-first tensors; results of several areas are merged, gradients are added, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from counterpoint.kernels.mask import Area
from counterpoint.kernels.merge import accumulator, merge

BAND_ROWS = 256  # without windows, a band is computed in strips of this many queries


@dataclass(frozen=True, slots=True)
class Form:
    """Which keys of a call its queries see: all, causal (top left), by an additive bias, or lo <= j - i <= hi."""

    causal: bool = False
    bias: Tensor | None = None
    lo: int | None = None
    hi: int | None = None


# (q, k, v, form, scale) -> (out, lse), and (dout, q, k, v, out, lse, form, scale) -> (dq, dk, dv), of tensors
# (B, H, S, D), (B, G, T, D) and (B, H, S)
Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def forward(
    call: Forward,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    areas: tuple[Area, ...],
    scale: float,
    windows: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out, lse) over all areas, of tokens-first tensors. windows: the kernel takes a band whole."""
    if len(areas) == 1 and areas[0].rows == q.shape[1] and (areas[0].full or areas[0].causal):
        a = areas[0]
        return _forward(
            call, q, k[:, a.k_start : a.k_stop], v[:, a.k_start : a.k_stop], Form(a.causal), scale
        )
    out = torch.zeros(q.shape, dtype=accumulator(q), device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=accumulator(q), device=q.device)
    high = 0  # rows from here on have no result yet
    for rows, columns, form in _calls(areas, q, windows):
        part = _forward(call, q[:, rows], k[:, columns], v[:, columns], form, scale)
        if rows.start >= high:
            out[:, rows], lse[:, rows] = part
        else:
            merge(out[:, rows], lse[:, rows], *part)
        high = max(high, rows.stop)
    return out.to(q.dtype), lse


def backward(
    call: Backward,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    areas: tuple[Area, ...],
    scale: float,
    windows: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), summed over all areas."""
    whole = len(areas) == 1 and (areas[0].full or areas[0].causal)
    if whole and areas[0].rows == q.shape[1] and areas[0].columns == k.shape[1]:
        grads = _backward(call, dout, q, k, v, out, lse, Form(areas[0].causal), scale)
        dq, dk, dv = (g.to(accumulator(g)) for g in grads)
        return dq, dk, dv
    dq, dk, dv = (torch.zeros(x.shape, dtype=accumulator(x), device=x.device) for x in (q, k, v))
    for rows, columns, form in _calls(areas, q, windows):
        grads = _backward(
            call, dout[:, rows], q[:, rows], k[:, columns], v[:, columns], out[:, rows], lse[:, rows], form, scale
        )  # fmt: skip
        dq[:, rows] += grads[0]
        dk[:, columns] += grads[1]
        dv[:, columns] += grads[2]
    return dq, dk, dv


def _forward(
    call: Forward, q: Tensor, k: Tensor, v: Tensor, form: Form, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = call(*(x.transpose(1, 2) for x in (q, k, v)), form, scale)
    return out.transpose(1, 2), lse.transpose(1, 2).to(accumulator(q))


def _backward(call: Backward, dout, q, k, v, out, lse, form: Form, scale: float) -> tuple[Tensor, ...]:
    grads = call(*(x.transpose(1, 2) for x in (dout, q, k, v, out, lse)), form, scale)
    return tuple(g.transpose(1, 2) for g in grads)


def _calls(areas: tuple[Area, ...], like: Tensor, windows: bool) -> Iterator[tuple[slice, slice, Form]]:
    """Rows, columns and form of every call. Without windows a band becomes strips with a small bias each."""
    biases: dict[tuple, Tensor] = {}
    for a in areas:
        if a.full or a.causal:
            yield slice(a.q_start, a.q_stop), slice(a.k_start, a.k_stop), Form(a.causal)
            continue
        if windows:
            yield slice(a.q_start, a.q_stop), slice(a.k_start, a.k_stop), Form(lo=a.lo, hi=a.hi)
            continue
        for i in range(0, a.rows, BAND_ROWS):
            stop = min(a.rows, i + BAND_ROWS)
            left = 0 if a.lo is None else max(0, i + a.lo)
            right = a.columns if a.hi is None else min(a.columns, stop + a.hi)
            shape = (stop - i, right - left, i - left, a.lo, a.hi)
            if shape not in biases:
                biases[shape] = _bias(range(i, stop), range(left, right), a, like)
            columns = slice(a.k_start + left, a.k_start + right)
            yield slice(a.q_start + i, a.q_start + stop), columns, Form(bias=biases[shape])


def _bias(rows: range, columns: range, a: Area, like: Tensor) -> Tensor:
    i, j = (torch.arange(r.start, r.stop, device=like.device) for r in (rows, columns))
    ahead = j - i.unsqueeze(1)
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if a.lo is not None:
        seen &= ahead >= a.lo
    if a.hi is not None:
        seen &= ahead <= a.hi
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)
