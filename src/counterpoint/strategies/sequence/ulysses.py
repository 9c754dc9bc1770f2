"""DeepSpeed Ulysses: heads are exchanged for tokens by all-to-all (arXiv 2309.14509).

Before attention every rank holds all heads of its tokens; after the first exchange, all tokens of its heads. It
attends as on a single device, and a second exchange brings the outputs back. Backward mirrors forward.

Query heads are dealt out as evenly as they go; a key/value head goes to every rank that has one of its query heads,
so it is replicated where there are fewer of them than ranks, and its gradients are summed by the owner.

Bytes a rank sends forward, N tokens over P ranks, h = H d, G key/value heads, P dividing H and G:
2 N h (1 + G/H) (P-1) / P^2 elements; backward the same when the forward pass was Ulysses too. With G < P every rank
sends each peer the one head it needs.
"""

from __future__ import annotations

from dataclasses import replace

from counterpoint.strategies.sequence.allgather import peers
from counterpoint.strategies.sequence.blocks import (
    Attention,
    AttentionBackward,
    Axis,
    Block,
    kv_heads_of,
    split_evenly,
)
from counterpoint.strategies.sequence.builder import AttentionBuilder
from counterpoint.strategies.sequence.tree import Branches

Heads = list[tuple[int, int]]


def forward(b: AttentionBuilder, axis: Axis, q: Block, kv: Block, attend: Attention) -> Block:
    """(q), (k, v) -> (out, lse), or (out) alone when nobody asked for lse."""
    q_heads, kv_heads = deal_heads(b, axis, q)
    all_q, places = to_heads(b, axis, q, q_heads, "q")
    all_kv, _ = to_heads(b, axis, seen_keys(b, q, kv), kv_heads, "kv")
    out = attend(all_q, all_kv)
    if b.saved is not None:
        b.saved.update(q=all_q, kv=all_kv, out=out)
    if not b.wants_lse:
        out = replace(out, values=out.values[:1], specs=out.specs[:1])
    out = b.cast(out, q.specs[0].dtype)
    return b.join_heads(to_tokens(b, axis, q, out, places, q_heads, "out"))


def backward(
    b: AttentionBuilder, axis: Axis, q: Block, kv: Block, attend: AttentionBackward
) -> tuple[Block, Block]:
    """(q, dout, lse, delta), (k, v) -> (dq), (dk, dv)."""
    q_heads, kv_heads = deal_heads(b, axis, q)
    own, kv = b.here(kv, axis), seen_keys(b, q, kv)
    if b.saved:
        all_q, all_kv, out = (b.saved[name] for name in ("q", "kv", "out"))
        dout, places = to_heads(
            b, axis, replace(q, values=q.values[1:2], specs=q.specs[1:2]), q_heads, "dout"
        )
        packet = b.packet(all_q, dout, out)
    else:
        packet, places = to_heads(b, axis, q, q_heads, "q")
        all_kv, _ = to_heads(b, axis, kv, kv_heads, "kv")
    dq, dkv = attend(packet, all_kv)
    _, kv_places = b.gather([Block((), kv.specs, tokens, kv.heads) for tokens in kv.tokens])
    dq = b.cast(dq, q.specs[0].dtype)
    replicated = sum(y - x for x, y in kv_heads) > kv.heads[1] - kv.heads[0]
    if not replicated:  # nothing is summed any more, so gradients may travel in the dtype of k and v
        dkv = b.cast(dkv, kv.specs[0].dtype)
    dq_parts = to_tokens(b, axis, q, dq, places, q_heads, "dq")
    dkv_parts = to_tokens(b, axis, kv, dkv, kv_places, kv_heads, "dkv")
    total = b.add_heads(dkv_parts, kv.heads) if replicated else b.join_heads(dkv_parts)
    if own.tokens != kv.tokens[axis.rank]:
        total = b.whole(b.add(None, total, own.tokens), b.gradient_specs(own), own.tokens, kv.heads)
    return b.join_heads(dq_parts), total


def seen_keys(b: AttentionBuilder, q: Block, kv: Block) -> Block:
    """The keys that any query sees: a window over a long cache leaves some that nobody does."""
    return b.take(kv, Branches(b.seen_by(tokens, q.tokens) for tokens in kv.tokens))


def deal_heads(b: AttentionBuilder, axis: Axis, q: Block) -> tuple[Heads, Heads]:
    """Query heads and key/value heads of every rank on the axis."""
    count = q.heads[1] - q.heads[0]
    if count < axis.size:
        raise ValueError(
            f"ulysses cannot split {count} query heads over {axis.size} ranks: use at most {count} ranks on this axis, "
            "or another strategy (ring, tokenring, allgather) for it"
        )
    q_heads = [(q.heads[0] + x, q.heads[0] + y) for x, y in split_evenly(count, axis.size)]
    return q_heads, [kv_heads_of(b.shape, heads) for heads in q_heads]


def to_heads(b: AttentionBuilder, axis: Axis, block: Block, heads: Heads, name: str):
    """From (my tokens, all heads) to (all tokens, my heads); and where each rank's tokens lie."""
    own = b.here(block, axis)
    mine = b.take_heads(own, *heads[axis.rank])
    sends = {axis[i]: b.take_heads(own, *heads[i]) for i in peers(axis)}
    recvs = {axis[j]: (mine, block.tokens[j]) for j in peers(axis)}
    names = ("k", "v") if name == "kv" else [f"{name}{i}_" if i else name for i in range(len(block.specs))]
    received = b.exchange("all_to_all", axis.channel("heads"), sends, recvs, names)
    return b.gather([received[axis[j]] if j != axis.rank else mine for j in range(axis.size)])


def to_tokens(b: AttentionBuilder, axis: Axis, like: Block, whole: Block, places, heads: Heads, name: str):
    """From (all tokens, my heads) to (my tokens, heads of rank i) for every rank i of the axis."""
    r = axis.rank
    parts = {j: b.pick(whole, like.tokens[j], places[j]) for j in (r, *peers(axis))}  # alike on all ranks
    types = [
        Block((), b.with_heads(whole.specs, heads[i]), like.tokens[r], heads[i]) for i in range(axis.size)
    ]
    names = [f"{name}{i}_" if i else name for i in range(len(whole.specs))]
    received = b.exchange(
        "all_to_all",
        axis.channel("tokens"),
        {axis[j]: parts[j] for j in peers(axis)},
        {axis[i]: (types[i], like.tokens[r]) for i in peers(axis)},
        names,
    )
    return [received[axis[i]] if i != r else parts[r] for i in range(axis.size)]
