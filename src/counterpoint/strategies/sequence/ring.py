"""Ring Attention: K and V circulate, Q stays (Liu et al. 2023, arXiv 2310.01889).

N ranks, rank r holds Q_r, K_r, V_r. At step t it attends Q_r to the block of rank j = r - t, while that block moves
on to rank r + 1. Partial outputs are merged by their logsumexp. In the backward pass (dK_j, dV_j) follow their block
around the ring, every rank adds its share, and the last one brings them home.

Bytes a rank sends, all in one direction, u = bytes of its Q, g = query heads per key/value head, no mask:
forward (N-1) 2u/g; backward (N-1) 2u/g for K, V and N 2u/g x (4 / element size) for float32 dK, dV.
Tokens that no rank further along the ring sees are not sent on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from counterpoint.strategies.sequence.blocks import Attention, AttentionBackward, Axis, Block
from counterpoint.strategies.sequence.builder import AttentionBuilder
from counterpoint.strategies.sequence.sight import seen_ahead, without
from counterpoint.strategies.sequence.tree import Tree

Walk = tuple[Block, int, str]  # a block for the whole axis, the way it walks (+1 up, -1 down), channel suffix


def forward(
    b: AttentionBuilder, axis: Axis, q: Block, kv: Block, attend: Attention, *, way: int = 1
) -> Block:
    """(q), (k, v) -> (out, lse). way: +1 sends blocks to the next rank, -1 to the one before."""
    return circulate(b, axis, q, [(kv, _checked(way), "")], attend)


def backward(
    b: AttentionBuilder,
    axis: Axis,
    q: Block,
    kv: Block,
    attend: AttentionBackward,
    *,
    way: int = 1,
    wire_dtype: str | None = None,
) -> tuple[Block, Block]:
    """(q, dout, lse, delta), (k, v) -> (dq), (dk, dv). wire_dtype: of travelling dK, dV (default float32)."""
    dq, (dkv,) = circulate_backward(b, axis, q, [(kv, _checked(way), "")], attend, wire_dtype)
    return dq, dkv


def circulate(b: AttentionBuilder, axis: Axis, q: Block, walks: Sequence[Walk], attend: Attention) -> Block:
    """Forward, for blocks of keys and values that walk around the ring side by side."""
    mine = b.here(q, axis)
    out = None
    for visits in zip(*(walk(b, axis, q, kv, way, f"kv{suffix}") for kv, way, suffix in walks), strict=True):
        for _, block in visits:
            part = attend(b.take(mine, b.seeing(mine.tokens, block.tokens)), block)
            out = b.merge(out, part, mine.tokens)
    return b.whole(out, b.attention_specs(q), mine.tokens, q.heads)


def circulate_backward(
    b: AttentionBuilder,
    axis: Axis,
    q: Block,
    walks: Sequence[Walk],
    attend: AttentionBackward,
    wire_dtype: str | None,
) -> tuple[Block, list[Block]]:
    """Backward of `circulate`: dq, and (dk, dv) of every walk."""
    mine = b.here(q, axis)
    carried = [GradientWalk(b, axis, q, *w, wire_dtype=wire_dtype) for w in walks]
    dq = None
    for visits in zip(*(walk(b, axis, q, kv, way, f"kv{suffix}") for kv, way, suffix in walks), strict=True):
        for gradient, (j, block) in zip(carried, visits, strict=True):
            dq_part, dkv_part = attend(b.take(mine, b.seeing(mine.tokens, block.tokens)), block)
            dq = b.add(dq, dq_part, mine.tokens)
            gradient.visit(j, dkv_part)
    return b.whole(dq, b.gradient_specs(q)[:1], mine.tokens, q.heads), [g.home() for g in carried]


def walk(
    b: AttentionBuilder,
    axis: Axis,
    q: Block,
    block: Block,
    way: int = 1,
    channel: str = "kv",
    names=("k", "v"),
) -> Iterator[tuple[int, Block]]:
    """Lead every rank's block past this one: yields (rank it belongs to, block), the own block first.

    Before a block is yielded it is sent on, as far as ranks further along see it, and the next one is expected.
    """
    r, N = axis.rank, axis.size

    def seen(j: int):  # for t = 0..N the part of block j that the ranks from step t on see
        return seen_ahead(b.mask, block.tokens[j], q.tokens, j, way)[0]

    visiting, ahead = b.here(block, axis), seen(r)
    for t in range(N):
        j, following = (r - way * t) % N, (r - way * (t + 1)) % N
        b.send_block(b.take(visiting, ahead[t + 1]), axis[r + way], axis.channel(channel))
        labels, ahead = [f"{name}{following}" for name in names], seen(following)
        arriving = b.recv_block(visiting, ahead[t + 1], axis[r - way], axis.channel(channel), labels)
        yield j, visiting
        visiting = arriving


class GradientWalk:
    """The gradients of the blocks, each following its block from rank to rank and then home to its owner."""

    def __init__(
        self, b, axis: Axis, q: Block, kv: Block, way: int, suffix: str, *, wire_dtype: str | None
    ) -> None:
        self.b, self.axis, self.q, self.kv, self.way = b, axis, q, kv, way
        self.channel, self.channel_home = axis.channel(f"dkv{suffix}"), axis.channel(f"home{suffix}")
        self.specs = b.gradient_specs(kv)
        self.wire = wire_dtype or self.specs[0].dtype
        self.own: Block | None = None

    def visit(self, j: int, part: Block) -> None:
        """Add this rank's share of the gradient of block j, and send it on; the owner's share sets out first."""
        b, axis, r = self.b, self.axis, self.axis.rank
        last, shared = self._journey(j)
        hops = (r - j) * self.way % axis.size
        if hops > last:
            return
        if j == r:
            tokens = self.kv.tokens[r]
            self.own = b.whole(b.add(None, part, tokens), self.specs, tokens, self.kv.heads)
            total = b.take(self.own, shared)  # what nobody else sees stays here
        else:
            total = self._receive(j, shared, axis[r - self.way], self.channel)
            total = b.whole(b.add(total or None, part, shared), self.specs, shared, self.kv.heads)
        to, channel = (axis[r + self.way], self.channel) if hops < last else (axis[j], self.channel_home)
        if last:
            b.send_block(b.cast(total, self.wire), to, channel)

    def home(self) -> Block:
        """The gradient of this rank's own block, back from its journey."""
        b, r = self.b, self.axis.rank
        last, shared = self._journey(r)
        assert self.own is not None
        if not last:
            return self.own
        tokens = self.kv.tokens[r]
        total = b.add(
            None, self._receive(r, shared, self.axis[r + self.way * last], self.channel_home), tokens
        )
        total = b.add(total, b.take(self.own, without(tokens, shared)), tokens)
        return b.whole(total, self.specs, tokens, self.kv.heads)

    def _receive(self, j: int, tokens: Tree, source: int, channel: str) -> Block:
        like = self.b.cast(Block((), self.specs, tokens, self.kv.heads), self.wire)
        block = self.b.recv_block(like, tokens, source, channel, (f"dk{j}", f"dv{j}"))
        return self.b.cast(block, self.specs[0].dtype)

    def _journey(self, j: int) -> tuple[int, Tree]:
        """How many hops block j makes until nobody further sees it, and the part of it that anybody else sees."""
        ahead, last = seen_ahead(self.b.mask, self.kv.tokens[j], self.q.tokens, j, self.way)
        return last, ahead[1]


def _checked(way: int) -> int:
    if way not in (1, -1):
        raise ValueError(f"way is {way!r}; use 1 (blocks go to the next rank) or -1 (to the one before)")
    return way
