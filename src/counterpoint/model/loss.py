"""Losses over the vocabulary that never hold the logits of a whole sequence, forward or backward.

Whatever is trained, the model enters the loss through the log-probability of one token per position. So a loss is a
function of log-probabilities that is a sum over tokens, and logits exist for `head_tokens` positions at a time: they
are computed, their gradient is taken, and they are gone (StreamBP, arXiv 2506.03077, section 3.1).

Shapes: N tokens, E hidden size, V vocabulary. Labels are already shifted, IGNORE where no loss is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
HEAD_TOKENS = 1024

# log-probabilities (n,) float32 and extra values (n,) each -> sum over the tokens
TokenSum = Callable[..., Tensor]


def token_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, head_tokens: int | None = HEAD_TOKENS
) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropies of the tokens and the number of tokens that counted, both scalars.

    hidden (..., E), labels (...) int64, weight (V, E) of the head. The sum, not the mean: ranks hold different
    numbers of tokens and only the caller knows all of them. Raises ValueError when the shapes differ.
    """
    return streamed_sum(hidden, weight, labels, _cross_entropy, (), head_tokens), (labels != IGNORE).sum()


def streamed_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    value: TokenSum,
    extras: Sequence[Tensor] = (),
    head_tokens: int | None = HEAD_TOKENS,
) -> Tensor:
    """value(log-probabilities of the labels, *extras), a sum over the labelled tokens: a float32 scalar.

    value must be separable, the sum of a function of each token alone; extras (...) are cut as the labels are.
    Its gradient is computed along with it, `head_tokens` tokens at a time, and only scaled in the backward pass,
    so a loss that is a function of such sums (DPO's is) costs no more. head_tokens None: all logits at once, kept
    for the backward pass, as plain autograd does. Raises ValueError when the shapes differ.
    """
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, hidden states {tuple(hidden.shape[:-1])}")
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    extras = tuple(x.reshape(-1) for x in extras)
    if head_tokens is None:
        rows = (labels != IGNORE).nonzero().flatten()
        logprobs = F.log_softmax(_wide(F.linear(hidden[rows], weight)), dim=-1)
        return value(logprobs.gather(1, labels[rows, None])[:, 0], *(x[rows] for x in extras))
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _Streamed.apply(hidden, weight, labels, value, extras, head_tokens, wanted)  # type: ignore[return-value]


@torch.no_grad()
def token_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, head_tokens: int | None = HEAD_TOKENS
) -> Tensor:
    """Log-probability of each label (...) in float32, 0 where it is ignored; no gradient."""
    found = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    flat = found.view(-1)
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    for rows in _rows(labels, head_tokens):
        logits = _wide(F.linear(hidden[rows], weight))
        flat[rows] = (logits.gather(1, labels[rows, None])[:, 0] - logits.logsumexp(-1)).float()
    return found


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, labels, value, extras, head_tokens: int, wanted: bool):
        total = torch.zeros((), dtype=_wider(hidden.dtype), device=hidden.device)
        needs_hidden, needs_weight = (wanted and needed for needed in ctx.needs_input_grad[:2])
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight = (
            torch.zeros(weight.shape, dtype=_wider(weight.dtype), device=weight.device)
            if needs_weight
            else None
        )
        for rows in _rows(labels, head_tokens):
            h, target = hidden[rows], labels[rows, None]
            logits = _wide(F.linear(h, weight))
            lse = logits.logsumexp(-1, keepdim=True)
            logprobs = (logits.gather(1, target) - lse)[:, 0].requires_grad_(wanted)
            with torch.enable_grad():
                part = value(logprobs, *(x[rows] for x in extras))
            total += part.detach()
            if not (needs_hidden or needs_weight):
                continue
            (d_logprobs,) = torch.autograd.grad(part, logprobs)
            # gradient of the logits: d (one_hot - softmax), in the memory of the logits
            d_logits = logits.sub_(lse).exp_().mul_(-d_logprobs[:, None])
            d_logits.scatter_add_(1, target, d_logprobs[:, None])
            if d_hidden is not None:
                d_hidden[rows] = torch.mm(d_logits.to(_operand(weight, h)), weight).to(hidden.dtype)
            if d_weight is not None:
                _add_product(d_weight, d_logits, h)
        ctx.gradients = d_hidden, d_weight
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("the streamed loss was differentiated already; its gradients are spent")
        d_hidden, d_weight = ctx.gradients
        ctx.gradients = None
        d_hidden = None if d_hidden is None else d_hidden.mul_(d_total)
        d_weight = None if d_weight is None else d_weight.mul_(d_total).to(ctx.dtype)
        return d_hidden, d_weight, None, None, None, None, None


def _cross_entropy(logprobs: Tensor) -> Tensor:
    return -logprobs.sum()


def _rows(labels: Tensor, head_tokens: int | None) -> Iterator[Tensor]:
    """Indices of labelled tokens, so many at a time: the others never meet the head."""
    rows = (labels != IGNORE).nonzero().flatten()
    yield from rows.split(head_tokens or max(1, len(rows)))


def _wider(dtype: torch.dtype) -> torch.dtype:
    """Of sums and softmax: float32, but float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _wide(x: Tensor) -> Tensor:
    return x.to(_wider(x.dtype))


def _operand(weight: Tensor, hidden: Tensor) -> torch.dtype:
    """The dtype in which d_logits meets the weight; autocast takes care of itself."""
    return torch.promote_types(weight.dtype, hidden.dtype)


def _add_product(total: Tensor, d_logits: Tensor, h: Tensor) -> None:
    """total (V, E) += d_logits^T h, without a second matrix of that size where the dtypes allow it."""
    if total.dtype == d_logits.dtype == h.dtype and not torch.is_autocast_enabled(h.device.type):
        total.addmm_(d_logits.T, h)
    else:
        total += torch.mm(d_logits.to(h.dtype).T, h)
