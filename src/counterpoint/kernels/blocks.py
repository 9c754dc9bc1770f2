"""One block of attention with torch: forward with logsumexp, backward from a logsumexp computed elsewhere, merge.

Shapes, with B batch, S query tokens, T key tokens, H query heads, G key/value heads, D head dim:
q, out, dout (B, S, H, D); k, v (B, T, G, D); lse, delta (B, S, H). Tokens come before heads, so that a
range of tokens of one sequence is contiguous memory and can be sent as it is. Softmax statistics, partial outputs
that are merged, and gradients that are summed are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from counterpoint.kernels.mask import Area, AttentionMask, one_document

_BAND_ROWS = 256  # a sliding window is computed in strips of this many queries
_MATH_ROWS = 1024  # the fallback materialises scores for this many queries at a time


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask | tuple[Area, ...],
    *,
    scale: float | None = None,
    groups: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Attention of a block of queries over a block of keys: (out, logsumexp).

    mask: areas of the block, or a rule for tokens that start at position 0 on both sides. Queries that see no key
    get out 0 and logsumexp -inf. groups: query heads per key/value head, when they differ; empty means H / G each.
    out has q's dtype.
    """
    areas = _areas(mask, q, k)
    if groups and len(set(groups)) > 1:
        parts = [
            attend(q[:, :, a], k[:, :, b], v[:, :, b], areas, scale=scale) for a, b in _head_parts(groups)
        ]
        return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)
    if len(areas) == 1 and areas[0].rows == q.shape[1] and (areas[0].full or areas[0].causal):
        a = areas[0]
        return _forward(q, k[:, a.k_start : a.k_stop], v[:, a.k_start : a.k_stop], a.causal, None, scale)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=_accumulator(q), device=q.device)
    high = 0  # rows from here on have no result yet
    for (q0, q1), (k0, k1), causal, bias in _calls(areas, q):
        part = _forward(q[:, q0:q1], k[:, k0:k1], v[:, k0:k1], causal, bias, scale)
        if q0 >= high:
            out[:, q0:q1], lse[:, q0:q1] = part
        else:
            merge(out[:, q0:q1], lse[:, q0:q1], *part)
        high = max(high, q1)
    return out, lse


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: AttentionMask | tuple[Area, ...],
    *,
    scale: float | None = None,
    groups: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of one block, in float32, given the whole row's out and logsumexp.

    Summed over the blocks of a row (dq) or a column (dk, dv) they are the gradients of the whole attention. dk and
    dv are summed over the query heads that share a key/value head.
    """
    areas = _areas(mask, q, k)
    if groups and len(set(groups)) > 1:
        parts = [
            attend_backward(
                dout[:, :, a],
                q[:, :, a],
                k[:, :, b],
                v[:, :, b],
                out[:, :, a],
                lse[:, :, a],
                areas,
                scale=scale,
            )
            for a, b in _head_parts(groups)
        ]
        dq, dk, dv = (torch.cat(grads, 2) for grads in zip(*parts, strict=True))
        return dq, dk, dv
    whole = len(areas) == 1 and (areas[0].full or areas[0].causal)
    if whole and areas[0].rows == q.shape[1] and areas[0].columns == k.shape[1]:
        dq, dk, dv = _backward(dout, q, k, v, out, lse, areas[0].causal, None, scale)
        return _float(dq), _float(dk), _float(dv)
    dq, dk, dv = (torch.zeros(x.shape, dtype=_accumulator(x), device=x.device) for x in (q, k, v))
    for (q0, q1), (k0, k1), causal, bias in _calls(areas, q):
        rows, columns = slice(q0, q1), slice(k0, k1)
        grads = _backward(
            dout[:, rows],
            q[:, rows],
            k[:, columns],
            v[:, columns],
            out[:, rows],
            lse[:, rows],
            causal,
            bias,
            scale,
        )
        dq[:, rows] += grads[0]
        dk[:, columns] += grads[1]
        dv[:, columns] += grads[2]
    return dq, dk, dv


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
    return torch.einsum("bshd,bshd->bsh", _float(dout), _float(out))


def output_standing_in(dout: Tensor, delta: Tensor) -> Tensor:
    """An `out` with rowsum(dout * out) = delta.

    The flash kernels take out where the mathematics takes delta. Where only delta has travelled, this vector along
    dout serves them: delta dout / |dout|^2, with dout scaled to unit maximum first so that nothing overflows.
    """
    direction = _float(dout)
    top = direction.abs().amax(-1, keepdim=True)
    unit = direction / top.clamp_min(torch.finfo(direction.dtype).tiny)
    length = unit.square().sum(-1, keepdim=True).clamp_min(1.0)
    factor = delta.unsqueeze(-1) / (length * top)
    return unit.mul_(factor.nan_to_num_(0.0, 0.0, 0.0)).to(dout.dtype)


# ---- areas to kernel calls -----------------------------------------------------------------------
def _areas(mask: AttentionMask | tuple[Area, ...], q: Tensor, k: Tensor) -> tuple[Area, ...]:
    if isinstance(mask, AttentionMask):
        return mask.areas(one_document(q.shape[1]), one_document(k.shape[1]))
    return mask


def _head_parts(groups: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Slices of query and key/value heads in which every key/value head serves equally many query heads."""
    q = start = 0
    for g in range(1, len(groups) + 1):
        if g == len(groups) or groups[g] != groups[start]:
            count = groups[start] * (g - start)
            yield slice(q, q + count), slice(start, g)
            q, start = q + count, g


def _calls(
    areas: tuple[Area, ...], like: Tensor
) -> Iterator[tuple[tuple[int, int], tuple[int, int], bool, Tensor | None]]:
    """Kernel calls: rows, columns, causal, additive bias. A band becomes strips with a small bias each."""
    biases: dict[tuple, Tensor] = {}
    for a in areas:
        if a.full or a.causal:
            yield (a.q_start, a.q_stop), (a.k_start, a.k_stop), a.causal, None
            continue
        for i in range(0, a.rows, _BAND_ROWS):
            stop = min(a.rows, i + _BAND_ROWS)
            left = 0 if a.lo is None else max(0, i + a.lo)
            right = a.columns if a.hi is None else min(a.columns, stop + a.hi)
            shape = (stop - i, right - left, i - left, a.lo, a.hi)
            if shape not in biases:
                ahead = torch.arange(left, right, device=like.device) - torch.arange(
                    i, stop, device=like.device
                ).unsqueeze(1)
                seen = torch.ones_like(ahead, dtype=torch.bool)
                if a.lo is not None:
                    seen &= ahead >= a.lo
                if a.hi is not None:
                    seen &= ahead <= a.hi
                biases[shape] = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(
                    ~seen, -torch.inf
                )
            yield (
                (a.q_start + i, a.q_start + stop),
                (a.k_start + left, a.k_start + right),
                False,
                biases[shape],
            )


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _float(x: Tensor) -> Tensor:
    return x.to(_accumulator(x))


# ---- the kernels of each device ------------------------------------------------------------------
def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float | None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
    elif _has_flash(q, bias):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        )
    else:
        out, lse = _math_forward(q, k, v, causal, bias, scale)
    return out.transpose(1, 2), lse.transpose(1, 2).to(_accumulator(q))


def _backward(dout, q, k, v, out, lse, causal: bool, bias: Tensor | None, scale: float | None):
    dout, q, k, v, out, lse = (x.transpose(1, 2) for x in (dout, q, k, v, out, lse))
    if q.device.type == "cpu":
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse.to(_accumulator(q)), 0.0, causal, attn_mask=bias, scale=scale
        )
    elif _has_flash(q, bias):
        empty = torch.empty(0, dtype=torch.uint64, device=q.device)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse.contiguous(),
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            causal,
            empty,
            empty,
            scale=scale,
        )
    else:
        grads = _math_backward(dout, q, k, v, out, lse, causal, bias, scale)
    return tuple(g.transpose(1, 2) for g in grads)


def _has_flash(q: Tensor, bias: Tensor | None) -> bool:
    return q.device.type == "cuda" and bias is None and q.dtype in (torch.float16, torch.bfloat16)


def _math_forward(q, k, v, causal: bool, bias: Tensor | None, scale: float | None):
    """Plain attention in query strips, for devices and dtypes without a flash kernel. Shapes (B, H, S, D)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs, lses = [], []
    for i in range(0, q.shape[2], _MATH_ROWS):
        scores = _scores(q[:, :, i : i + _MATH_ROWS], k, i, causal, bias, scale)
        lse = scores.logsumexp(-1)
        p = torch.exp(scores - lse.unsqueeze(-1)).to(v.dtype)
        outs.append((_grouped(p, v) @ v.unsqueeze(2)).flatten(1, 2))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _math_backward(dout, q, k, v, out, lse, causal: bool, bias: Tensor | None, scale: float | None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dq, dk, dv = [], torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    delta = (dout.float() * out.float()).sum(-1, keepdim=True)
    for i in range(0, q.shape[2], _MATH_ROWS):
        rows = slice(i, i + _MATH_ROWS)
        p = torch.exp(_scores(q[:, :, rows], k, i, causal, bias, scale) - lse[:, :, rows].unsqueeze(-1))
        dp = (_grouped(dout[:, :, rows].float(), v) @ v.float().transpose(-1, -2).unsqueeze(2)).flatten(1, 2)
        ds = p * (dp - delta[:, :, rows])
        dv += (_grouped(p, v).transpose(-1, -2) @ _grouped(dout[:, :, rows].float(), v)).sum(2)
        dk += scale * (_grouped(ds, k).transpose(-1, -2) @ _grouped(q[:, :, rows].float(), k)).sum(2)
        dq.append(scale * (_grouped(ds, k) @ k.float().unsqueeze(2)).flatten(1, 2))
    return torch.cat(dq, 2), dk, dv


def _grouped(x: Tensor, kv: Tensor) -> Tensor:
    """(B, H, S, *) -> (B, G, H / G, S, *), so that a key/value head meets its query heads without being repeated."""
    return x.unflatten(1, (kv.shape[1], -1))


def _scores(q: Tensor, k: Tensor, first: int, causal: bool, bias: Tensor | None, scale: float) -> Tensor:
    scores = (_grouped(q, k).float() @ k.float().transpose(-1, -2).unsqueeze(2)).flatten(1, 2) * scale
    if bias is not None:
        scores = scores + bias[first : first + q.shape[2]]
    if causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(first)
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores
