"""TokenRing: queries walk the ring, partial outputs go straight back to their owner (arXiv 2412.20501).

    N ranks on a ring; rank r holds Q_r, K_r, V_r, and K_r, V_r never move
    t = 0       (out, lse) <- attend(Q_r, K_r, V_r)
    t = 1..N-1  Q of rank j = r + t has arrived from rank r + 1 and goes on to rank r - 1
                (part, part_lse) <- attend(Q_j, K_r, V_r), sent straight home to rank j
                from rank r - t comes my own part of this step: merge it into (out, lse), one step later,
                while the next part is computed

Queries use one direction of every link, partial outputs the other, so a full-duplex link works both ways. A query
travels only as far as it still sees keys: with causal attention in zigzag layout, once Q_j has passed rank 0 only
its second half goes on, and every step costs every rank the same.

The backward pass moves the same way: the packet (Q, dO, lse, D) walks, D = rowsum(dO * O); dQ goes straight home;
dK and dV are summed where K and V are.

Bytes a rank sends, u = bytes of its Q, d head dim, e element size, no mask; causal zigzag averages 0.75 of it:
forward (N-1) u towards r - 1 and (N-1) u (1 + 4/(d e)) home; backward (N-1) 2u (1 + 4/(d e)) towards r - 1 and
(N-1) u x (4 / e) home for float32 dQ.
"""

from __future__ import annotations

from collections.abc import Callable

from counterpoint.strategies.sequence.blocks import (
    Attention,
    AttentionBackward,
    AttentionBuilder,
    Axis,
    Block,
)

Combine = Callable[..., Block | None]


def forward(
    b: AttentionBuilder,
    axis: Axis,
    q: Block,
    kv: Block,
    attend: Attention,
    *,
    packets: int = 1,
    relay: bool = True,
    wire_dtype: str | None = None,
) -> Block:
    """(q), (k, v) -> (out, lse).

    packets: heads are cut into so many packets that travel one by one, so returns start earlier and the last one,
    which nothing hides, is smaller. relay: False sends Q to every peer directly instead of from rank to rank.
    wire_dtype: of partial outputs on their way home (default: the dtype of q); logsumexp stays float32.
    """
    local = b.here(kv, axis)

    def visit(queries: Block) -> Block:
        return attend(queries, b.keys_for(local, queries))

    out = circulate(b, axis, q, kv, visit, b.merge, "out", packets, relay, wire_dtype)
    return b.whole(out, b.attention_specs(q), q.tokens[axis.rank], q.heads)


def backward(
    b: AttentionBuilder,
    axis: Axis,
    q: Block,
    kv: Block,
    attend: AttentionBackward,
    *,
    packets: int = 1,
    relay: bool = True,
    wire_dtype: str | None = None,
) -> tuple[Block, Block]:
    """(q, dout, lse, delta), (k, v) -> (dq), (dk, dv). Options as in `forward`; dQ travels in float32 by default."""
    local = b.here(kv, axis)
    sums: dict[tuple[int, int], Block | None] = {}

    def visit(queries: Block) -> Block:
        keys = b.keys_for(local, queries)
        dq, dkv = attend(queries, keys)
        sums[keys.heads] = b.add(sums.get(keys.heads), dkv, keys.tokens)
        return dq

    dq = circulate(b, axis, q, kv, visit, b.add, "dq", packets, relay, wire_dtype)
    specs = b.gradient_specs(kv)
    parts = [
        b.whole(total, b.with_heads(specs, heads), local.tokens, heads)
        for heads, total in sorted(sums.items())
    ]
    dkv = b.join_heads(parts)
    return b.whole(dq, b.gradient_specs(q)[:1], q.tokens[axis.rank], q.heads), dkv


def circulate(
    b: AttentionBuilder,
    axis: Axis,
    q: Block,
    kv: Block,
    visit: Callable[[Block], Block],
    combine: Combine,
    back: str,
    packets: int,
    relay: bool,
    wire_dtype: str | None,
) -> Block | None:
    """Lead every Q past every rank: `visit` what passes here, send the result home, combine what comes home."""
    r, N = axis.rank, axis.size
    queries, keys = q.tokens, kv.tokens
    packet = b.head_packets(b.here(q, axis), packets)
    channel_q, channel_back = axis.channel("q"), axis.channel(back)
    b.depth(channel_q, 2 * len(packet))
    b.depth(channel_back, 2 * len(packet))
    specs = b.gradient_specs(q)[:1] if back == "dq" else b.attention_specs(q)
    wire = wire_dtype or specs[0].dtype

    def seen(j: int, t: int):  # the part of Q_j that sees keys of the rank it visits at step t
        return b.seeing(queries[j], [keys[(j - t) % N]])

    def walking(j: int, t: int):  # the part of Q_j that arrives at step t: it sees keys here, or further on
        return b.seeing(queries[j], [keys[(j - s) % N] for s in range(t, N)]) if relay else seen(j, t)

    visiting, returned = packet, []
    total: list[Block | None] = [None] * len(packet)
    for t in range(N):
        j, following = (r + t) % N, (r + t + 1) % N
        arriving = []
        for p, block in enumerate(visiting if t + 1 < N else []):
            if relay:
                b.send_block(b.take(block, walking(j, t + 1)), axis[r - 1], channel_q)
            else:
                b.send_block(b.take(packet[p], seen(r, t + 1)), axis[r - t - 1], channel_q)
            source = axis[r + 1] if relay else axis[following]
            names = [f"{v}{following}" for v in ("q", "dout", "lse", "delta")]
            arriving.append(
                b.recv_block(block, walking(following, t + 1), source, channel_q, names[: len(q.specs)])
            )
        for p, block in enumerate(visiting):
            part = visit(b.take(block, seen(j, t)))
            if t == 0:
                total[p] = combine(total[p], part, queries[r])
            else:
                b.send_block(b.cast(part, wire), axis[j], channel_back)
        for p, part in returned:
            total[p] = combine(total[p], part, queries[r])
        returned = []
        if t:
            for p, own in enumerate(packet):
                like = b.cast(Block((), b.with_heads(specs, own.heads), own.tokens, own.heads), wire)
                names = [f"{back}_from{axis[r - t]}", f"lse_from{axis[r - t]}"][: len(specs)]
                returned.append((p, b.recv_block(like, seen(r, t), axis[r - t], channel_back, names)))
        visiting = arriving
    for p, part in returned:
        total[p] = combine(total[p], part, queries[r])
    filled = [part for part in total if part is not None]
    return b.join_heads(filled) if filled else None
