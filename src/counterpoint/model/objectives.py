"""Losses of fine-tuning as functions of the log-probabilities of tokens; all but DPO's last step are sums over tokens.

SFT is the cross entropy of the completions' tokens (`counterpoint.model.loss.token_loss`). Shapes: n tokens; all in
float32. `old` and `reference` are log-probabilities of the same tokens under the policy that sampled them and under
a frozen one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def signed_sum(logprobs: Tensor, sign: Tensor) -> Tensor:
    """Log-probability of the chosen answer (sign 1) minus that of the rejected one (sign -1)."""
    return (logprobs * sign).sum()


def preference(margin: Tensor, own: float, total: float, beta: float, shares: int) -> Tensor:
    """DPO's loss of a pair, -log sigmoid(beta d), split over `shares` processes: their parts sum to it.

    margin: this process's part of `signed_sum`, differentiable; own: its value less the reference's; total: d, the
    sum of `own` over the processes. The gradient of the sum is -beta (1 - sigmoid(beta d)) times that of the margin,
    so each part passes on its own share. Source: DPO (arXiv 2305.18290), equation 7.
    """
    distance = beta * torch.tensor(total, dtype=torch.float64)
    slope = float(-beta * torch.sigmoid(-distance))
    return float(F.softplus(-distance)) / shares + slope * (margin - margin.detach())


def group_policy(
    logprobs: Tensor,
    old: Tensor,
    reference: Tensor,
    advantage: Tensor,
    weight: Tensor,
    *,
    clip: float,
    kl: float,
) -> Tensor:
    """GRPO's loss summed over tokens: -min(p A, clamp(p, 1 - clip, 1 + clip) A) + kl D, times weight.

    p = exp(logprobs - old); D = exp(r) - r - 1 with r = reference - logprobs, an estimate of the divergence from the
    reference. Source: DeepSeekMath (arXiv 2402.03300), equations 3 and 4.
    """
    ratio = torch.exp(logprobs - old)
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    loss = -gain
    if kl:
        away = reference - logprobs
        loss = loss + kl * (torch.exp(away) - away - 1)
    return (loss * weight).sum()
