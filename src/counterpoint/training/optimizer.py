"""AdamW with warm-up and cosine, and the clipping of gradients, on plain and on sharded parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from counterpoint.training.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters of `model`; matrices decay, vectors (norms, biases) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas)


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Learning rate of step 0, 1, ..., steps - 1: linear up to `lr` at step warmup - 1, then to `min_lr`.

    The cosine reaches `min_lr` at the last step. Source: Loshchilov and Hutter, arXiv 1608.03983, without
    restarts.
    """
    warmup = config.warmup_steps(steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    share = (step - warmup + 1) / max(1, steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(model: nn.Module, limit: float) -> float:
    """Global gradient norm over all shards, before clipping to `limit`; 0 only measures."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit > 0:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return float(full(norm))


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered when it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
