"""A short causal convolution along the tokens, one filter per channel, with torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(
    x: Tensor, weight: Tensor, before: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """y_t = sum over i of weight[:, i] x_(t - width + 1 + i), shaped like x (B, S, C), as nn.Conv1d has it.

    weight: (C, width). before: the tokens just before x, (B, up to width - 1, C); what is missing counts as zero.
    positions: (S,) position of every token in its document; no tap reaches over its start. None: x is of one document.
    """
    width, tokens = weight.shape[1], x.shape[1]
    whole = x if before is None else torch.cat([before, x], 1)
    whole = F.pad(whole, (0, 0, width - 1 + tokens - whole.shape[1], 0))
    y = torch.zeros_like(x)
    for i in range(width):
        tap = whole[:, i : i + tokens] * weight[:, i].to(x.dtype)
        if positions is not None:
            tap = tap * (positions >= width - 1 - i).to(x.dtype)[:, None]
        y = y + tap
    return y
