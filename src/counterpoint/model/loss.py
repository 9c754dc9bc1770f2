"""Next-token cross entropy that never holds the logits of a whole sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100


def token_loss(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, chunk_tokens: int = 1024
) -> tuple[Tensor, Tensor]:
    """Sum of the token losses and the number of tokens that counted, both scalars.

    hidden (..., hidden_size), labels (...) int64 and already shifted, -100 where no loss is wanted; head maps
    hidden to logits. The float32 logits of `chunk_tokens` tokens at a time exist, forward and backward (a
    chunk's are computed again in the backward pass). The sum, not the mean: ranks hold different numbers of
    tokens and only the caller knows all of them. Raises ValueError when the shapes differ.
    """
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, hidden states {tuple(hidden.shape[:-1])}")
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)

    def chunk_loss(h: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head(h).float(), target, ignore_index=IGNORE, reduction="sum")

    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for h, target in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(chunk_loss, h, target, use_reentrant=False, preserve_rng_state=False)
        else:
            total = total + chunk_loss(h, target)
    return total, (labels != IGNORE).sum()
