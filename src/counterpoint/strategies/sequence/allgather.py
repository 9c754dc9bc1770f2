"""All-gather: every rank collects all K and V, attends once, and in the backward pass scatters dK and dV back.

The method of Llama 3's context parallelism (arXiv 2407.21783, section 3.3.2). A rank's own block is attended while
the others are under way. Each rank sends each peer only the keys that the peer's queries see.

Bytes a rank sends, u = bytes of its Q, g = query heads per key/value head, no mask: forward (N-1) 2u/g; backward
(N-1) 2u/g for K, V and (N-1) 2u/g x (4 / element size) for float32 dK, dV. Memory for N blocks of K and V.
"""

from __future__ import annotations

from counterpoint.kernels.shape import Place
from counterpoint.strategies.sequence.blocks import Attention, AttentionBackward, Axis, Block
from counterpoint.strategies.sequence.builder import AttentionBuilder
from counterpoint.strategies.sequence.sight import without


def forward(b: AttentionBuilder, axis: Axis, q: Block, kv: Block, attend: Attention) -> Block:
    """(q), (k, v) -> (out, lse)."""
    mine, own = b.here(q, axis), b.here(kv, axis)
    remote, _ = gather(b, axis, q, kv)
    out = None
    for keys in (own, remote):
        part = attend(b.take(mine, b.seeing(mine.tokens, keys.tokens)), keys)
        out = b.merge(out, part, mine.tokens)
    return b.whole(out, b.attention_specs(q), mine.tokens, q.heads)


def backward(
    b: AttentionBuilder,
    axis: Axis,
    q: Block,
    kv: Block,
    attend: AttentionBackward,
    *,
    wire_dtype: str | None = None,
) -> tuple[Block, Block]:
    """(q, dout, lse, delta), (k, v) -> (dq), (dk, dv). wire_dtype: of scattered dK, dV (default float32)."""
    mine, own = b.here(q, axis), b.here(kv, axis)
    remote, places = gather(b, axis, q, kv)
    dq = dkv = scattered = None
    for keys in (own, remote):
        dq_part, dkv_part = attend(b.take(mine, b.seeing(mine.tokens, keys.tokens)), keys)
        dq = b.add(dq, dq_part, mine.tokens)
        if keys is own:
            dkv = b.add(dkv, dkv_part, own.tokens)
        else:
            scattered = b.whole(
                b.add(None, dkv_part, keys.tokens), b.gradient_specs(kv), keys.tokens, kv.heads
            )
    assert scattered is not None
    r, others = axis.rank, peers(axis)
    needed = [[b.seen_by(kv.tokens[j], q.tokens[i]) for j in range(axis.size)] for i in range(axis.size)]
    like = b.cast(Block((), b.gradient_specs(kv), own.tokens, kv.heads), wire_dtype)
    sends = {axis[j]: b.cast(b.pick(scattered, needed[r][j], places[j]), wire_dtype) for j in others}
    received = b.exchange(
        "reduce_scatter",
        axis.channel("scatter"),
        sends,
        {axis[i]: (like, needed[i][r]) for i in others},
        ("dk", "dv"),
    )
    for i in sorted(others):
        dkv = b.add(dkv, received[axis[i]], own.tokens)
    return (
        b.whole(dq, b.gradient_specs(q)[:1], mine.tokens, q.heads),
        b.whole(dkv, b.gradient_specs(kv), own.tokens, kv.heads),
    )


def peers(axis: Axis) -> list[int]:
    """The other places on the axis, the next one first, so that not all ranks start with the same one."""
    return [(axis.rank + t) % axis.size for t in range(1, axis.size)]


def gather(
    b: AttentionBuilder, axis: Axis, q: Block, kv: Block
) -> tuple[Block, dict[int, tuple[Place, ...]]]:
    """What this rank's queries need of the other ranks' K and V, as one block; and where each rank's part lies."""
    r, others = axis.rank, peers(axis)
    own = b.here(kv, axis)
    if not others:
        return b.take(own, without(own.tokens, own.tokens)), {}
    sends = {axis[i]: b.take(own, b.seen_by(own.tokens, q.tokens[i])) for i in others}
    recvs = {axis[j]: (own, b.seen_by(kv.tokens[j], q.tokens[r])) for j in others}
    received = b.exchange("all_gather", axis.channel("gather"), sends, recvs, ("k", "v"))
    order = sorted(others)
    remote, places = b.gather([received[axis[j]] for j in order])
    return remote, dict(zip(order, places, strict=True))
