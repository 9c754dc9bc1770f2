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

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from counterpoint.kernels.kernel import TensorSpec
from counterpoint.strategies.sequence.blocks import Attention, AttentionBackward, Axis, Block
from counterpoint.strategies.sequence.builder import AttentionBuilder
from counterpoint.strategies.sequence.sight import seeing_ahead
from counterpoint.strategies.sequence.tree import Tree


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
    which nothing hides, is smaller; results of odd and of even steps then have a channel each, as those of one step
    are still on their way to one rank when the first of the next are ready for another. relay: False sends Q to every
    peer directly instead of from rank to rank.
    wire_dtype: of partial outputs on their way home (default: the dtype of q); logsumexp stays float32.
    """
    local = b.here(kv, axis)

    def visit(queries: Block) -> Block:
        return attend(queries, b.keys_for(local, queries))

    home = Homeward(axis.channel("out"), b.attention_specs(q), wire_dtype)
    out = circulate(b, axis, q, kv, visit, b.merge, home, packets, relay)
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

    home = Homeward(axis.channel("dq"), b.gradient_specs(q)[:1], wire_dtype)
    dq = circulate(b, axis, q, kv, visit, b.add, home, packets, relay)
    specs = b.gradient_specs(kv)
    dkv = [b.whole(x, b.with_heads(specs, heads), local.tokens, heads) for heads, x in sorted(sums.items())]
    return b.whole(dq, home.specs, q.tokens[axis.rank], q.heads), b.join_heads(dkv)


def circulate(
    b: AttentionBuilder,
    axis: Axis,
    q: Block,
    kv: Block,
    visit: Callable[[Block], Block],
    combine: Callable[..., Block | None],
    home: Homeward,
    packets: int,
    relay: bool,
) -> Block | None:
    """Lead all queries past all ranks: `visit` those that are here, send the result home, `combine` what comes home."""
    if not isinstance(relay, bool):
        raise ValueError(f"relay is {relay!r}; use true or false")
    r, N = axis.rank, axis.size
    own = b.head_packets(q, packets)
    b.depth(axis.channel("q"), 2 * len(own))

    def way(t: int) -> str:  # the channel of the results of step t
        return f"{home.channel}.even" if len(own) > 1 and t % 2 == 0 else home.channel

    for channel in (way(0), way(1)):
        b.depth(channel, max(2, len(own)))
    total: list[Block | None] = [None] * len(own)
    returned: list[Block] = []
    for t, blocks in enumerate(zip(*(walk(b, axis, packet, kv, relay) for packet in own), strict=True)):
        parts = [visit(block) for block in blocks]
        for part in parts if t > 0 else []:
            home.send(b, part, axis[r + t], way(t))
        for p, part in enumerate(parts if t == 0 else returned):
            total[p] = combine(total[p], part, q.tokens[r])
        if t > 0:
            seen = b.seeing(q.tokens[r], kv.tokens[(r - t) % N])
            returned = [home.receive(b, packet, seen, axis[r - t], way(t)) for packet in own]
    for p, part in enumerate(returned):
        total[p] = combine(total[p], part, q.tokens[r])
    filled = [part for part in total if part is not None]
    return b.join_heads(filled) if filled else None


def walk(b: AttentionBuilder, axis: Axis, q: Block, kv: Block, relay: bool) -> Iterator[Block]:
    """What visits this rank at steps 0, 1, ...: the queries of rank r + t, those of them that see keys here.

    Before they are yielded they are sent on, as far as they see keys further along, and the next are expected.
    """
    r, N = axis.rank, axis.size
    queries, keys, channel = q.tokens, kv.tokens, axis.channel("q")
    names = ("q", "dout", "lse", "delta")[: len(q.specs)]

    def seen(j: int, t: int):  # the part of Q_j that sees keys of the rank it is at in step t
        return b.seeing(queries[j], keys[(j - t) % N])

    def walking(j: int, t: int):  # the part of Q_j that sees keys there or further on
        return seeing_ahead(b.mask, queries[j], keys, j, -1)[t]

    own = visiting = b.here(q, axis)
    for t in range(N):
        j, following = (r + t) % N, (r + t + 1) % N
        arriving = visiting
        if t + 1 < N:
            labels = [f"{name}{following}" for name in names]
            if relay:
                b.send_block(b.take(visiting, walking(j, t + 1)), axis[r - 1], channel)
                arriving = b.recv_block(own, walking(following, t + 1), axis[r + 1], channel, labels)
            else:
                b.send_block(b.take(own, seen(r, t + 1)), axis[r - t - 1], channel)
                arriving = b.recv_block(own, seen(following, t + 1), axis[following], channel, labels)
        yield b.take(visiting, seen(j, t))
        visiting = arriving


@dataclass(frozen=True, slots=True)
class Homeward:
    """The way back: the channel, the types of what returns, and the dtype it travels in."""

    channel: str
    specs: tuple[TensorSpec, ...]
    wire_dtype: str | None

    def send(self, b: AttentionBuilder, part: Block, owner: int, channel: str) -> None:
        b.send_block(b.cast(part, self.wire_dtype or self.specs[0].dtype), owner, channel)

    def receive(self, b: AttentionBuilder, own: Block, tokens: Tree, source: int, channel: str) -> Block:
        """What rank `source` made of the tokens `tokens` of this rank's own queries."""
        like = b.cast(Block((), b.with_heads(self.specs, own.heads), tokens, own.heads), self.wire_dtype)
        names = [f"{self.channel}_from{source}", f"lse_from{source}"]
        return b.recv_block(like, tokens, source, channel, names[: len(self.specs)])
