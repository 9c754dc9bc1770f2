"""The kernels of the package flash-attn (version 2.7 on), where it is installed. Heads-first tensors."""

from __future__ import annotations

import importlib
import inspect
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from counterpoint.kernels.aten import window
from counterpoint.kernels.calls import Form


@lru_cache(maxsize=1)
def missing() -> str:
    """Why the package cannot be used; empty when it can."""
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    try:
        known = inspect.signature(_interface()._flash_attn_forward).parameters
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        return f"flash-attn cannot be used: {' '.join(str(error).split())}"
    return "" if "window_size_left" in known else "flash-attn is older than 2.7"


def forward(q: Tensor, k: Tensor, v: Tensor, form: Form, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = _interface()._flash_attn_forward(
        q, k, v, dropout_p=0.0, softmax_scale=scale, return_softmax=False, **_mask(form, q, k)
    )
    return out.transpose(1, 2), lse


def backward(
    dout, q, k, v, out, lse, form: Form, scale: float, deterministic: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = (x.transpose(1, 2).contiguous() for x in (dout, q, k, v, out))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _interface()._flash_attn_backward(
        dout, q, k, v, out, lse.contiguous(), dq, dk, dv, dropout_p=0.0, softmax_scale=scale,
        deterministic=deterministic, **_mask(form, q, k),
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _mask(form: Form, q: Tensor, k: Tensor) -> dict[str, Any]:
    left, right = window(form, q.shape[1], k.shape[1])
    return {
        "causal": form.causal,
        "window_size_left": -1 if left is None else left,
        "window_size_right": 0 if form.causal else -1 if right is None else right,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def _interface() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")
