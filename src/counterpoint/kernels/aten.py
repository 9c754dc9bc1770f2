"""Attention kernels that come with torch, by their ATen operators, which return the logsumexp. Heads-first tensors.

All take a causal mask from the top left, which is where ours lies: causal areas are square.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint.kernels.calls import Form
from counterpoint.kernels.merge import accumulator

_LSE_ROWS = 32  # the memory-efficient kernels pad the rows of the logsumexp to a multiple of this


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, form: Form, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, form.causal, attn_mask=form.bias, scale=scale
    )


def cpu_backward(dout, q, k, v, out, lse, form: Form, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse.to(accumulator(q)), 0.0, form.causal, attn_mask=form.bias, scale=scale
    )


def window(form: Form, queries: int, keys: int) -> tuple[int | None, int | None]:
    """A band as FlashAttention counts it: keys to the left and right of a diagonal that ends at the bottom right."""
    shift = keys - queries
    left = None if form.lo is None else shift - form.lo
    right = None if form.hi is None else form.hi - shift
    return left, right


def flash_forward(q: Tensor, k: Tensor, v: Tensor, form: Form, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    left, right = window(form, q.shape[1], k.shape[1])
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, form.causal, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out.transpose(1, 2), lse


def flash_backward(dout, q, k, v, out, lse, form: Form, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    left, right = window(form, q.shape[1], k.shape[1])
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse.contiguous(), None, None, q.shape[1], k.shape[1], 0.0, form.causal, unused, unused,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def efficient_forward(q: Tensor, k: Tensor, v: Tensor, form: Form, scale: float) -> tuple[Tensor, Tensor]:
    k, v = (_repeated(x, q) for x in (k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, _aligned(form.bias, q), True, 0.0, form.causal, scale=scale
    )
    return out, lse[:, :, : q.shape[2]]


def efficient_backward(dout, q, k, v, out, lse, form: Form, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = (_repeated(x, q) for x in (k, v))
    lse = F.pad(lse, (0, -lse.shape[2] % _LSE_ROWS)).contiguous()
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        dout, q, keys, values, _aligned(form.bias, q), out, lse, unused, unused, 0.0, [True, True, True, False],
        form.causal, scale=scale,
    )  # fmt: skip
    return dq, _summed(dk, k), _summed(dv, v)


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, form: Form, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, form.causal, False, scale=scale
    )
    return out, lse.squeeze(-1) if lse.ndim == 4 else lse


def cudnn_backward(dout, q, k, v, out, lse, form: Form, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse.unsqueeze(-1).contiguous(), unused, unused, None, None, None, q.shape[2], k.shape[2],
        0.0, form.causal, scale=scale,
    )  # fmt: skip


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    group = q.shape[1] // x.shape[1]
    return x.repeat_interleave(group, 1) if group > 1 else x


def _summed(grad: Tensor, kv: Tensor) -> Tensor:
    group = grad.shape[1] // kv.shape[1]
    return grad.unflatten(1, (-1, group)).sum(2, dtype=accumulator(grad)) if group > 1 else grad


def _aligned(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """(S, T) for every head, with rows that begin at multiples of 16 elements, as the kernels want them."""
    if bias is None:
        return None
    columns = bias.shape[1]
    padded = F.pad(bias, (0, -columns % 16))[:, :columns]
    return padded.expand(*q.shape[:2], *padded.shape)
