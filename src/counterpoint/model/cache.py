"""What layers keep of the tokens so far, for sampling one token after the other in one process."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint.kernels.convolution import convolve
from counterpoint.kernels.linear_blocks import attend_from
from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Attend
from counterpoint.model.linear import Mix

_QUERY_BLOCK = 512


class KeyValueCache:
    """Room for `capacity` tokens per softmax layer, a state per linear one; `attends` is what the decoder is given."""

    def __init__(self, config: ModelConfig, capacity: int) -> None:
        self.capacity = capacity
        self.attends: list[Attend | Mix] = [
            _StateCache() if config.is_linear(layer) else _LayerCache(capacity, config.window(layer))
            for layer in config.layers
        ]


class _StateCache:
    """The state (B, H, D, E) of a linear layer, and the last tokens that its convolution looks back to."""

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self.tail: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
        gates = log_decay
        if gates is not None:
            gates = gates[None, :, None].expand(q.shape[:3]) if gates.ndim == 1 else gates
            gates = (gates if gates.ndim == 4 else gates.unsqueeze(-1)).float()
        out, self.state = attend_from(q.float(), k.float(), v.float(), gates, self.state)
        return out.to(v.dtype)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        y = convolve(x, weight, self.tail)
        seen = x if self.tail is None else torch.cat((self.tail, x), 1)
        self.tail = seen[:, max(0, seen.shape[1] - weight.shape[1] + 1) :]
        return y


class _LayerCache:
    def __init__(self, capacity: int, window: int | None) -> None:
        self.capacity, self.window, self.length = capacity, window, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of the new tokens' q (B, H, N, D) to all tokens so far and to their own k, v."""
        if self.keys is None or self.values is None:
            self.keys, self.values = (x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in (k, v))
        start, self.length = self.length, self.length + q.shape[2]
        assert self.length <= self.capacity, "the caller sized the cache"
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        if start == 0 and (self.window is None or self.length <= self.window):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        blocks = range(start, self.length, _QUERY_BLOCK)
        outs = [self._block(q[:, :, i - start : i - start + _QUERY_BLOCK], i) for i in blocks]
        return torch.cat(outs, dim=2)

    def _block(self, q: Tensor, start: int) -> Tensor:
        assert self.keys is not None and self.values is not None
        stop = start + q.shape[2]
        first = 0 if self.window is None else max(0, start + 1 - self.window)
        mask = None
        if q.shape[2] > 1:
            distance = torch.arange(start, stop)[:, None] - torch.arange(first, stop)
            mask = (distance >= 0) & (distance < (self.window or self.capacity))
            mask = mask.to(q.device)
        k, v = self.keys[:, :, first:stop], self.values[:, :, first:stop]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
