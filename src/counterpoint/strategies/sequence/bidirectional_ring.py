"""Bidirectional ring: half of every K/V block walks up the ring, the other half down.

Both directions of every link carry half of Ring Attention's bytes: forward (N-1) u/g each way, the sum is the same.
Symbols as in `ring`.
"""

from __future__ import annotations

from counterpoint.strategies.sequence.blocks import Attention, AttentionBackward, Axis, Block
from counterpoint.strategies.sequence.builder import AttentionBuilder
from counterpoint.strategies.sequence.ring import circulate, circulate_backward


def forward(b: AttentionBuilder, axis: Axis, q: Block, kv: Block, attend: Attention) -> Block:
    """(q), (k, v) -> (out, lse)."""
    upper, lower = b.halves(kv)
    return circulate(b, axis, q, [(upper, 1, ".up"), (lower, -1, ".down")], attend)


def backward(
    b: AttentionBuilder,
    axis: Axis,
    q: Block,
    kv: Block,
    attend: AttentionBackward,
    *,
    wire_dtype: str | None = None,
) -> tuple[Block, Block]:
    """(q, dout, lse, delta), (k, v) -> (dq), (dk, dv). wire_dtype: of travelling dK, dV (default float32)."""
    upper, lower = b.halves(kv)
    walks = [(upper, 1, ".up"), (lower, -1, ".down")]
    dq, halves = circulate_backward(b, axis, q, walks, attend, wire_dtype)
    dkv = None
    for half in halves:
        dkv = b.add(dkv, half, kv.tokens[axis.rank])
    return dq, b.whole(dkv, b.gradient_specs(kv), kv.tokens[axis.rank], kv.heads)
