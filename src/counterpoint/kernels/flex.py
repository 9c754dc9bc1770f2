"""FlexAttention over areas. Its backward takes no logsumexp from elsewhere, but its logsumexp has a gradient.

With P' = exp(S - L) for the L of the whole row, l that of this block and D = rowsum(dout out) of the whole row, the
block's gradients are those of P' (dP - D). Since P' = exp(l - L) P, they come out of the block's own attention for
dout' = exp(l - L) dout and a gradient exp(l - L) (rowsum(dout out_block) - D) of l: one more forward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from counterpoint.kernels.mask import Area
from counterpoint.kernels.merge import row_delta
from counterpoint.kernels.triton_attention import limits


def forward(
    q: Tensor, k: Tensor, v: Tensor, areas: tuple[Area, ...], scale: float, compiled: bool = True
) -> tuple[Tensor, Tensor]:
    """(out, lse), tokens first."""
    mask = block_mask(areas, q.shape[1], k.shape[1], q.device, compiled)
    out, lse = _attention(compiled)(*(x.transpose(1, 2) for x in (q, k, v)), mask, scale)
    return out.transpose(1, 2), lse.transpose(1, 2).float()


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    areas: tuple[Area, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in float32, tokens first."""
    return backward_of(lambda q, k, v: forward(q, k, v, areas, scale), dout, q, k, v, out, lse)


def backward_of(
    attention: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of a block by any attention whose out and logsumexp have gradients, given out and lse of whole rows."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        part, part_lse = attention(q, k, v)
    # of a row that sees nothing here: no share, and no gradient
    share = torch.exp(part_lse.detach() - lse).nan_to_num_(0.0, 0.0, 0.0)
    of_lse = share * (row_delta(dout, part.detach()) - row_delta(dout, out))
    of_out = (dout * share.unsqueeze(-1)).to(part.dtype)
    dq, dk, dv = torch.autograd.grad((part, part_lse), (q, k, v), (of_out, of_lse))
    return dq.float(), dk.float(), dv.float()


@lru_cache(maxsize=64)
def block_mask(
    areas: tuple[Area, ...], queries: int, keys: int, device: torch.device, compiled: bool = True
) -> Any:
    """The areas as FlexAttention's BlockMask."""
    from torch.nn.attention.flex_attention import create_block_mask

    bounds = [limits(a) for a in areas]

    def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = i < 0
        for q0, q1, k0, k1, lo, hi in bounds:
            seen = seen | ((i >= q0) & (i < q1) & (j >= k0) & (j < k1) & (j - i >= lo) & (j - i <= hi))
        return seen

    return create_block_mask(sees, None, None, queries, keys, device=device, _compile=compiled)


@lru_cache(maxsize=2)
def _attention(compiled: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> tuple[Tensor, Tensor]:
        grouped = q.shape[1] != k.shape[1]
        out, aux = flex_attention(
            q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped, return_aux=AuxRequest(lse=True)
        )
        assert aux.lse is not None
        return out, aux.lse

    return torch.compile(run, dynamic=False) if compiled else run
