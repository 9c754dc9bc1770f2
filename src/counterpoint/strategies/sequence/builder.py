"""The verbs of sequence-parallel attention: take, send, receive, attend, merge, add.

An `AttentionBuilder` hides what every strategy would otherwise repeat: shards of unequal length, masks, tokens that
nobody needs any more, heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from counterpoint.kernels.attention import Add, Attend, AttendBackward, Delta, Merge, accumulator
from counterpoint.kernels.kernel import TensorSpec
from counterpoint.kernels.mask import AttentionMask
from counterpoint.kernels.shape import (
    AddHeads,
    Assemble,
    Cast,
    Fill,
    JoinHeads,
    Pick,
    Place,
    Spread,
    Take,
    TakeHeads,
)
from counterpoint.kernels.tokens import Tokens, in_order
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.schedule import Value
from counterpoint.strategies.sequence import sight
from counterpoint.strategies.sequence.blocks import (
    AttentionShape,
    Axis,
    Block,
    kv_heads_of,
    split_evenly,
)
from counterpoint.strategies.sequence.tree import Tree, depth, map_tree


class AttentionBuilder(Builder):
    """A builder that speaks in blocks. `place` is this rank's place on each axis, in nesting order."""

    def __init__(
        self,
        name: str,
        rank: int,
        world_size: int,
        shape: AttentionShape,
        mask: AttentionMask,
        place: tuple[int, ...],
    ) -> None:
        super().__init__(name, rank, world_size)
        self.shape, self.mask, self.place = shape, mask, place
        self.wants_lse = True  # does the caller need the logsumexp in the layout of the queries
        self._outs: dict[str, Value] = {}  # by the name of a delta: the output it was computed from
        self._borrowed: set[str] = (
            set()
        )  # received values: their buffers go back to the channel, so totals copy them
        self.saved: dict[str, Block] | None = None  # what a forward pass leaves for its own backward pass

    # ---- tokens --------------------------------------------------------------------------------
    def mine(self, tokens: Tree) -> Tokens:
        """This rank's leaf of a tree of tokens."""
        if not isinstance(tokens, Tokens):
            for place in self.place[len(self.place) - depth(tokens) :]:
                tokens = tokens[place]
        return tokens

    def seen_by(self, keys: Tree, queries: Tree) -> Tree:
        """The part of the keys that any of the queries sees."""
        return sight.seen_by(self.mask, keys, queries)

    def seeing(self, queries: Tree, keys: Tree) -> Tree:
        """The part of the queries that sees any of the keys."""
        return sight.seeing(self.mask, queries, keys)

    # ---- types ---------------------------------------------------------------------------------
    def attention_specs(self, q: Block) -> tuple[TensorSpec, ...]:
        """Types of (out, lse) for queries of these types."""
        return Attend((), 1.0).outputs(*q.specs[:1])

    def gradient_specs(self, block: Block) -> tuple[TensorSpec, ...]:
        """Types of the gradients of a block, which are summed in float32."""
        return tuple([s.cast(accumulator(s.dtype)) for s in block.specs])

    def with_heads(self, specs: Sequence[TensorSpec], heads: tuple[int, int]) -> tuple[TensorSpec, ...]:
        """The same types for another range of heads."""
        return tuple(s.with_size(2, heads[1] - heads[0]) for s in specs)

    # ---- blocks --------------------------------------------------------------------------------
    def here(self, block: Block, axis: Axis) -> Block:
        """A rank's own part of a block whose tokens are given for the whole axis: the view of the next axis."""
        assert isinstance(block.tokens, tuple)
        return block.over(block.tokens[axis.rank])

    def take(self, block: Block, tokens: Tree) -> Block:
        """The part of a block that covers `tokens` (a view when it is one range)."""
        if tokens is block.tokens and block:
            return block
        wanted, held = self.mine(tokens), self.mine(block.tokens)
        if not block or not wanted:
            return Block((), tuple([s.with_size(1, wanted.count) for s in block.specs]), tokens, block.heads)
        rows = held.locate(wanted)
        if rows == ((0, held.count),):
            return block.over(tokens)
        return self._made(block, [self._cut(Take(rows), v) for v in block.values], tokens)

    def take_heads(self, block: Block, start: int, stop: int) -> Block:
        """Heads `start` to `stop` of a block, numbered over the whole model."""
        if (start, stop) == block.heads:
            return block
        first = start - block.heads[0]
        specs = tuple(s.with_size(2, stop - start) for s in block.specs)
        values = [self._cut(TakeHeads(first, first + stop - start), v) for v in block.values]
        return Block(tuple(values), specs, block.tokens, (start, stop))

    def keys_for(self, kv: Block, queries: Block) -> Block:
        """The key/value heads that the queries' heads need."""
        return self.take_heads(kv, *kv_heads_of(self.shape, queries.heads))

    def head_packets(self, q: Block, packets: int) -> list[Block]:
        """Queries cut by heads into `packets` blocks, whose key/value heads are the same or disjoint."""
        if not isinstance(packets, int) or packets < 1:
            raise ValueError(f"packets is {packets!r}; give a number of at least 1")
        (a, b), g = q.heads, self.shape.group
        groups = [(max(a, x * g), min(b, (x + 1) * g)) for x in range(*kv_heads_of(self.shape, q.heads))]
        if packets <= len(groups):
            cuts = [(groups[i][0], groups[j - 1][1]) for i, j in split_evenly(len(groups), packets)]
        else:
            pieces = -(-packets // len(groups))
            cuts = [(x + i, x + j) for x, y in groups for i, j in split_evenly(y - x, min(pieces, y - x))]
        return [self.take_heads(q, *cut) for cut in cuts]

    def halves(self, block: Block) -> tuple[Block, Block]:
        """The first and the second half of the tokens that each rank holds."""
        first = map_tree(block.tokens, lambda t: t.pick([(0, t.count // 2)]))
        second = map_tree(block.tokens, lambda t: t.pick([(t.count // 2, t.count)]))
        return self.take(block, first), self.take(block, second)

    def join_heads(self, blocks: Sequence[Block]) -> Block:
        """Blocks of the same tokens and neighbouring heads as one."""
        heads = (blocks[0].heads[0], blocks[-1].heads[1])
        if len(blocks) == 1:
            return blocks[0]
        specs = tuple(s.with_size(2, heads[1] - heads[0]) for s in blocks[0].specs)
        values = [self.compute(JoinHeads(), *vs)[0] for vs in zip(*(b.values for b in blocks), strict=True)]
        return Block(tuple(values), specs, blocks[0].tokens, heads)

    def cast(self, block: Block, dtype: str | None) -> Block:
        """A block with its first value in another dtype (None: as it is); statistics keep theirs."""
        if dtype is None or block.specs[0].dtype == dtype:
            return block
        specs = tuple(s.cast(dtype) if len(s.shape) == 4 else s for s in block.specs)
        values = tuple(
            self.compute(Cast(dtype), v)[0] if v.spec != s else v
            for v, s in zip(block.values, specs, strict=False)
        )
        return Block(values, specs, block.tokens, block.heads)

    def gather(self, blocks: Sequence[Block]) -> tuple[Block, tuple[tuple[Place, ...], ...]]:
        """Blocks of different tokens laid into one, in ascending order where runs allow; and where each one went."""
        tokens = sight.merged(tuple(b.tokens for b in blocks))
        _, places = in_order(tuple(self.mine(b.tokens) for b in blocks))
        specs = tuple(s.with_size(1, self.mine(tokens).count) for s in blocks[0].specs)
        filled = [(b, tuple(p)) for b, p in zip(blocks, places, strict=True) if b]
        values: list[Value] = []
        if len(filled) == 1 and filled[0][0].tokens == tokens:
            values = list(filled[0][0].values)
        elif filled:
            kernel = Assemble(tuple(p for _, p in filled))
            values = [self.compute(kernel, *vs)[0] for vs in zip(*(b.values for b, _ in filled), strict=True)]
        whole = Block(tuple(values), specs, tokens, blocks[0].heads)
        return whole, tuple(tuple(p) for p in places)

    def pick(self, whole: Block, tokens: Tree, places: tuple[Place, ...]) -> Block:
        """The part of a gathered block that came from one of its blocks."""
        specs = tuple(s.with_size(1, self.mine(tokens).count) for s in whole.specs)
        if not whole or not places:
            return Block((), specs, tokens, whole.heads)
        values = [self.compute(Pick(places), v)[0] for v in whole.values]
        return Block(tuple(values), specs, tokens, whole.heads)

    def add_heads(self, blocks: Sequence[Block], heads: tuple[int, int]) -> Block:
        """Blocks of the same tokens and overlapping heads, summed in order into the heads `heads`."""
        specs = tuple(s.with_size(2, heads[1] - heads[0]) for s in blocks[0].specs)
        filled = [b for b in blocks if b]
        if not filled:
            return Block((), specs, blocks[0].tokens, heads)
        kernel = AddHeads(tuple(b.heads[0] - heads[0] for b in filled), heads[1] - heads[0])
        values = [self.compute(kernel, *vs)[0] for vs in zip(*(b.values for b in filled), strict=True)]
        return Block(tuple(values), specs, blocks[0].tokens, heads)

    # ---- messages ------------------------------------------------------------------------------
    def send_block(self, block: Block, to: int, channel: str) -> None:
        """Send a block as one message; nothing is sent of a block without tokens."""
        if block:
            self.send(block.values, to, channel)

    def recv_block(self, like: Block, tokens: Tree, source: int, channel: str, names: Sequence[str]) -> Block:
        """Receive a block of the types of `like` over `tokens`."""
        count = self.mine(tokens).count
        specs = tuple([s.with_size(1, count) for s in like.specs])
        values = self.recv(specs, source, channel, names) if count else ()
        self._borrowed.update([v.name for v in values])
        return Block(values, specs, tokens, like.heads)

    def exchange(
        self,
        kind: str,
        channel: str,
        sends: dict[int, Block],
        recvs: dict[int, tuple[Block, Tree]],
        names: Sequence[str],
    ) -> dict[int, Block]:
        """A collective of blocks: `recvs` gives, by rank, a block of the expected types and its tokens."""
        wanted = {}
        for rank, (like, tokens) in recvs.items():
            count = self.mine(tokens).count
            specs = tuple(s.with_size(1, count) for s in like.specs)
            wanted[rank] = Block((), specs, tokens, like.heads)
        items = {
            rank: [(f"{name}{rank}", s) for name, s in zip(names, b.specs, strict=True)]
            if self.mine(b.tokens)
            else []
            for rank, b in wanted.items()
        }
        received = self.collective(kind, channel, {rank: b.values for rank, b in sends.items()}, items)
        return {rank: replace(b, values=received.get(rank, ())) for rank, b in wanted.items()}

    # ---- mathematics ---------------------------------------------------------------------------
    def attend(self, q: Block, kv: Block) -> Block:
        """The innermost attention: one kernel on this rank. Empty when no query sees a key."""
        areas = self.mask.areas(self.mine(q.tokens), self.mine(kv.tokens)) if q and kv else ()
        specs = self.attention_specs(q)
        if not areas:
            return Block((), specs, q.tokens, q.heads)
        kernel = Attend(areas, self.shape.softmax_scale, self.groups(q, kv))
        return Block(
            self.compute(kernel, *q.values, *kv.values, names=("out", "lse")), specs, q.tokens, q.heads
        )

    def attend_backward(self, q: Block, kv: Block) -> tuple[Block, Block]:
        """Its backward: (q, dout, lse, delta), (k, v) -> (dq), (dk, dv), in float32."""
        held = self.mine(kv.tokens)
        seen = self.mask.seen_by(held, [self.mine(q.tokens)])
        if (
            seen is not held and len(held.locate(seen)) == 1
        ):  # gradients of keys that no query sees need no memory
            kv = self.take(kv, seen)
        areas = self.mask.areas(self.mine(q.tokens), self.mine(kv.tokens)) if q and kv else ()
        dq = Block((), self.gradient_specs(q)[:1], q.tokens, q.heads)
        dkv = Block((), self.gradient_specs(kv), kv.tokens, kv.heads)
        if not areas:
            return dq, dkv
        *row, delta = q.values
        out = self._outs.get(
            delta.name
        )  # where the output itself is at hand, the kernel need not stand in for it
        kernel = AttendBackward(areas, self.shape.softmax_scale, self.groups(q, kv), out is not None)
        a, *b = self.compute(kernel, *row, out or delta, *kv.values, names=("dq", "dk", "dv"))
        return Block((a,), dq.specs, dq.tokens, dq.heads), Block(tuple(b), dkv.specs, dkv.tokens, dkv.heads)

    def merge(self, total: Block | None, part: Block, over: Tree) -> Block | None:
        """Fold a partial (out, lse) into the total over the tokens `over`; either may be missing."""
        if not part:
            return total
        if total is None:
            return self._over(part, over, (0.0, -math.inf))
        total = self.cast(total, accumulator(total.specs[0].dtype))
        rows = self.mine(over).locate(self.mine(part.tokens))
        return self._made(total, self.compute(Merge(rows), *total.values, *part.values), over)

    def add(self, total: Block | None, part: Block, over: Tree) -> Block | None:
        """Add gradients of some tokens to the total over the tokens `over`, in float32; either may be missing."""
        if not part:
            return total
        part = self.cast(part, accumulator(part.specs[0].dtype))
        if total is None:
            return self._over(part, over, (0.0,) * len(part.specs))
        rows = self.mine(over).locate(self.mine(part.tokens))
        values = [self.compute(Add(rows), t, p)[0] for t, p in zip(total.values, part.values, strict=True)]
        return self._made(total, values, over)

    def whole(
        self, block: Block | None, specs: Sequence[TensorSpec], tokens: Tree, heads: tuple[int, int]
    ) -> Block:
        """The block; or if there was nothing to put into it, zeros (for a logsumexp, which has three dims, -inf)."""
        if block is not None:
            return block
        count = self.mine(tokens).count
        specs = tuple(s.with_size(1, count) for s in specs)
        fills = [-math.inf if len(s.shape) == 3 else 0.0 for s in specs]
        values = [
            self.compute(Fill(s, x), names=["empty"])[0] for s, x in zip(specs, fills, strict=True) if count
        ]
        return Block(tuple(values), specs, tokens, heads)

    def _over(self, part: Block, over: Tree, fills: Sequence[float]) -> Block:
        here, wanted = self.mine(part.tokens), self.mine(over)
        borrowed = any(v.name in self._borrowed for v in part.values)
        if here == wanted and not borrowed:
            return part.over(over)
        rows = wanted.locate(here)
        values = [
            self.compute(Spread(rows, wanted.count, fill), v)[0]
            for v, fill in zip(part.values, fills, strict=True)
        ]
        return self._made(part, values, over)

    def packet(self, q: Block, dout: Block, out: Block) -> Block:
        """(q, dout, lse, delta): what the backward pass needs of a row of queries. out holds (out, lse)."""
        delta_spec = Delta().outputs(dout.specs[0], out.specs[0])
        delta = self.compute(Delta(), *dout.values, out.values[0], names=("delta",)) if dout else ()
        self._outs.update({v.name: out.values[0] for v in delta})
        values = (*q.values, *dout.values, *out.values[1:], *delta)
        return Block(values, (*q.specs, *dout.specs, out.specs[1], *delta_spec), q.tokens, q.heads)

    def groups(self, q: Block, kv: Block) -> tuple[int, ...]:
        """Query heads of q per key/value head of kv."""
        g, (a, b) = self.shape.group, q.heads
        counts = tuple(min(b, (x + 1) * g) - max(a, x * g) for x in range(*kv.heads))
        assert min(counts) > 0 and sum(counts) == b - a, (
            f"heads {q.heads} do not fit key/value heads {kv.heads}"
        )
        return counts

    def _cut(self, kernel: Take | TakeHeads, value: Value) -> Value:
        part = self.compute(kernel, value)[0]
        if value.name in self._outs:
            self._outs[part.name] = self.compute(kernel, self._outs[value.name])[0]
        return part

    def _made(self, like: Block, values: Sequence[Value], tokens: Tree) -> Block:
        return Block(tuple(values), tuple([v.spec for v in values]), tokens, like.heads)
