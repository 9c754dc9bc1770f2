"""A linear attention layer: projections, an optional short convolution, decays, and a normed, gated output.

Shapes: B batch, S tokens at hand (of this rank), H heads, D key dimension, E value dimension. How tokens reach each
other is the caller's affair, as in `decoder`: `forward` is given a `Mix`.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterpoint.model.config import ModelConfig
from counterpoint.model.linear_config import DECAY_RANK, TEMPERATURE


class Mix(Protocol):
    """What a linear layer needs of the other tokens."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
        """q, k (B, H, S, D), v (B, H, S, E) -> out (B, H, S, E); log_decay None, (H,), (B, H, S) or (B, H, S, D)."""
        ...

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """A causal convolution of x (B, S, C) with weight (C, width), one filter per channel."""
        ...


class LinearAttention(nn.Module):
    """Every token reads a state of size H D E to which all before it have been added: S_t = a_t S_(t-1) + k_t v_t^T."""

    def __init__(self, config: ModelConfig, linear: type[nn.Linear]) -> None:
        super().__init__()
        assert config.linear is not None
        self.shape, hidden = config.linear, config.hidden_size
        s = self.shape
        keys, values = s.num_heads * s.key_head_dim, s.num_heads * s.value_head_dim
        self.q_proj = linear(hidden, keys, bias=False)
        self.k_proj = linear(hidden, keys, bias=False)
        self.v_proj = linear(hidden, values, bias=False)
        self.o_proj = linear(values, hidden, bias=False)
        self.o_norm = nn.RMSNorm(s.value_head_dim, config.rms_norm_eps)
        if s.output_gate:
            self.g_proj = linear(hidden, values, bias=False)
        if s.conv_kernel_dim:
            self.conv_weight = nn.Parameter(torch.empty(s.channels, s.conv_kernel_dim))
        if s.decay == "scalar":
            self.decay_proj = linear(hidden, s.num_heads, bias=True)
        if s.decay == "vector":
            self.decay_down = linear(hidden, DECAY_RANK, bias=False)
            self.decay_proj = linear(DECAY_RANK, keys, bias=True)

    def forward(self, x: Tensor, mix: Mix) -> Tensor:
        s = self.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if s.conv_kernel_dim:
            mixed = F.silu(mix.convolve(torch.cat((q, k, v), -1), self.conv_weight))
            q, k, v = mixed.split((q.shape[-1], k.shape[-1], v.shape[-1]), -1)
        q, k, v = (y.unflatten(-1, (s.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        q, k = self.features(q) * s.key_head_dim**-0.5, self.features(k)
        out = self.o_norm(mix(q, k, v, self.log_decay(x)).transpose(1, 2)).flatten(2)
        if s.output_gate:
            out = out * F.silu(self.g_proj(x))
        return self.o_proj(out)

    def features(self, x: Tensor) -> Tensor:
        kind = self.shape.feature_map
        return x if kind == "identity" else F.silu(x) if kind == "silu" else F.elu(x) + 1

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Logarithms of this layer's decays, in float32 and at most 0 by construction."""
        s = self.shape
        if s.decay == "none":
            return None
        if s.decay == "retention":
            return torch.tensor(s.rates, device=x.device, dtype=torch.float64).log().float()
        if s.decay == "scalar":
            return F.logsigmoid(self.decay_proj(x).float()).transpose(1, 2) / TEMPERATURE
        made = self.decay_proj(self.decay_down(x)).float().unflatten(-1, (s.num_heads, -1))
        return F.logsigmoid(made).transpose(1, 2) / TEMPERATURE
