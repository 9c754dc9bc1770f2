"""A transformer layer whose backward pass runs it again in chunks of the sequence: StreamBP (arXiv 2506.03077).

Kept from the forward pass is the layer's input alone. The backward pass computes keys and values of the whole
sequence once; then, chunk by chunk and each in a graph of its own, queries, attention to the causal prefix, and
feed-forward, and differentiates the chunk at once. Gradients of keys and values add up over the chunks and go
through their projections at the end. The result is exact up to the order of sums.

Where the sequence is shared by several processes, attention is one collective call over the whole shard (a call per
chunk would carry the keys around the ring once per chunk); projections and feed-forward still go in chunks.

Shapes as in counterpoint.model.decoder: x (B, S, E), q (B, H, S, D), k and v (B, G, S, D), cos and sin (., 1, S, D).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from counterpoint.kernels.mask import AttentionMask
from counterpoint.model.decoder import Attend, Layer
from counterpoint.runtime.memory import prefix
from counterpoint.runtime.memory.pieces import Leaves, autocast_state, in_tiles, parameters, spans


@dataclass(frozen=True, slots=True)
class Stream:
    """Runs a layer as above, in `chunks` chunks of this process's tokens; see `RunLayer` for the arguments.

    mask: what the layer's attention sees when the whole sequence lies in this process; None: `attend` is called,
    once for the whole shard. mlp_tiles: pieces of a chunk that the feed-forward works on one after the other.
    """

    chunks: int
    mask: AttentionMask | None = None
    mlp_tiles: int = 1

    def __call__(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        if not torch.is_grad_enabled():
            return _forward(self, layer, x, cos, sin, attend)
        return _Streamed.apply(x, cos, sin, self, layer, attend, *parameters(layer))  # type: ignore[return-value]


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, cos, sin, how: Stream, layer: Layer, attend: Attend, *_: Tensor) -> Tensor:
        ctx.save_for_backward(x, cos, sin)
        ctx.how, ctx.layer, ctx.attend, ctx.autocast = how, layer, attend, autocast_state(x.device)
        return _forward(how, layer, x, cos, sin, attend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor):
        x, cos, sin = ctx.saved_tensors
        leaves = Leaves(ctx.layer)
        again = _Backward(ctx.how, ctx.layer, leaves, x, cos, sin, ctx.autocast)
        with leaves.in_place():
            dx = again.alone(dout) if ctx.how.mask is not None else again.shared(dout, ctx.attend)
        return dx, None, None, None, None, None, *leaves.gradients()


def _forward(how: Stream, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
    out = torch.empty_like(x)
    pieces = spans(x.shape[1], how.chunks)
    if how.mask is None:
        whole = attend(*_projected(layer, x, cos, sin, pieces, _all_three))
    else:
        k, v = _projected(layer, x, cos, sin, pieces, _key_value_pair)
    for a, b in pieces:
        if how.mask is None:
            attended = whole[:, :, a:b]
        else:
            low, high, areas = prefix.seen(how.mask, a, b)
            q = _queries(layer, x[:, a:b], cos[:, :, a:b], sin[:, :, a:b])
            attended = prefix.attend(q, k[:, :, low:high], v[:, :, low:high], areas)
        out[:, a:b] = _finish(how, layer, x[:, a:b], attended)
    return out


@dataclass(slots=True)
class _Backward:
    """The backward pass of one layer; `layer` computes with `leaves`."""

    how: Stream
    layer: Layer
    leaves: Leaves
    x: Tensor
    cos: Tensor
    sin: Tensor
    autocast: Any

    def alone(self, dout: Tensor) -> Tensor:
        """dx when the whole sequence is here."""
        how, layer, x, pieces = self.how, self.layer, self.x, spans(self.x.shape[1], self.how.chunks)
        assert how.mask is not None
        with self.autocast():
            k, v = _projected(layer, x, self.cos, self.sin, pieces, _key_value_pair)
        dx = torch.empty_like(x)
        dk, dv = (torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (k, v))
        for a, b in pieces:
            low, high, areas = prefix.seen(how.mask, a, b)
            part, keys, values = (_leaf(t) for t in (x[:, a:b], k[:, :, low:high], v[:, :, low:high]))
            with torch.enable_grad(), self.autocast():
                q = _queries(layer, part, *self._angles(a, b))
                out = _finish(how, layer, part, prefix.attend(q, keys, values, areas))
            dx[:, a:b], d_keys, d_values = self.leaves.backward([out], [dout[:, a:b]], [part, keys, values])
            dk[:, :, low:high] += d_keys
            dv[:, :, low:high] += d_values
            del q, out, part, d_keys, d_values
        del k, v
        self._through_projections([dk, dv], dx, _key_value_pair)
        return dx

    def shared(self, dout: Tensor, attend: Attend) -> Tensor:
        """dx when attention is one call over the shards of all processes."""
        how, layer, x, pieces = self.how, self.layer, self.x, spans(self.x.shape[1], self.how.chunks)
        with self.autocast():
            projected = _projected(layer, x, self.cos, self.sin, pieces, _all_three)
        q, k, v = (_leaf(t) for t in projected)
        del projected
        with torch.enable_grad(), self.autocast():
            attended = attend(q, k, v)
        dx, d_attended = torch.empty_like(x), torch.empty_like(attended)
        for a, b in pieces:
            part, seen = _leaf(x[:, a:b]), _leaf(attended[:, :, a:b])
            with torch.enable_grad(), self.autocast():
                out = _finish(how, layer, part, seen)
            dx[:, a:b], d_attended[:, :, a:b] = self.leaves.backward([out], [dout[:, a:b]], [part, seen])
            del out, part, seen
        gradients = list(torch.autograd.grad(attended, [q, k, v], d_attended))
        del attended, d_attended, q, k, v
        self._through_projections(gradients, dx, _all_three)
        return dx

    def _through_projections(self, gradients: list[Tensor], dx: Tensor, project: Any) -> None:
        for a, b in spans(self.x.shape[1], self.how.chunks):
            part = _leaf(self.x[:, a:b])
            with torch.enable_grad(), self.autocast():
                made = project(self.layer, part, *self._angles(a, b))
            given = [g[:, :, a:b].to(m.dtype) for g, m in zip(gradients, made, strict=True)]
            dx[:, a:b] += self.leaves.backward(made, given, [part])[0]

    def _angles(self, a: int, b: int) -> tuple[Tensor, Tensor]:
        return self.cos[:, :, a:b], self.sin[:, :, a:b]


# ---- parts of a layer ------------------------------------------------------------------------------
def _queries(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return layer.self_attn.queries(layer.input_layernorm(x), cos, sin)


def _key_value_pair(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return layer.self_attn.keys_values(layer.input_layernorm(x), cos, sin)


def _all_three(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    h = layer.input_layernorm(x)
    return layer.self_attn.queries(h, cos, sin), *layer.self_attn.keys_values(h, cos, sin)


def _finish(how: Stream, layer: Layer, x: Tensor, attended: Tensor) -> Tensor:
    return layer.feed_forward(x + layer.self_attn.output(attended), in_tiles(layer, how.mlp_tiles))


@torch.no_grad()
def _projected(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, pieces, project: Any) -> list[Tensor]:
    """What `project` makes of all tokens, (B, heads, S, D) each with tokens before heads in memory."""
    whole: list[Tensor] = []
    for a, b in pieces:
        made = project(layer, x[:, a:b], cos[:, :, a:b], sin[:, :, a:b])
        if not whole:
            whole = [
                m.new_empty(m.shape[0], x.shape[1], m.shape[1], m.shape[3]).transpose(1, 2) for m in made
            ]
        for all_of_it, m in zip(whole, made, strict=True):
            all_of_it[:, :, a:b] = m
    return whole


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()
