"""Ring Self-Attention: two passes around the ring, with the row of scores in memory (Li et al. 2021, arXiv 2105.13120).

Forward: K walks, and every rank fills its rows of scores block by block; softmax of the complete rows; then V walks,
and the output is the sum of P_j V_j. No logsumexp is merged, so it is the plainest exact method, and the one that
needs the most memory: B H S^2 / N scores per rank.

Backward: K and V walk once more; P_j is recomputed from the logsumexp; every rank sums dK and dV of ALL tokens and an
all-reduce adds them up (reduce="reduce_scatter" leaves out the half of it whose result is thrown away).

Bytes a rank sends in units of its K block: forward 2 (N-1), backward 2 (N-1) + 4 (N-1) = 6 (N-1), no mask, float32.
"""

from __future__ import annotations

from counterpoint.kernels.attention import Add
from counterpoint.kernels.rows import RowSoftmax, Scores, Weigh
from counterpoint.strategies.sequence.allgather import peers
from counterpoint.strategies.sequence.blocks import Attention, AttentionBackward, Axis, Block
from counterpoint.strategies.sequence.builder import AttentionBuilder
from counterpoint.strategies.sequence.ring import walk

REDUCTIONS = ("all_reduce", "reduce_scatter")


def forward(b: AttentionBuilder, axis: Axis, q: Block, kv: Block, attend: Attention) -> Block:
    """(q), (k, v) -> (out, lse). The rows are whole, so no strategy can follow on another axis."""
    mine = b.here(q, axis)
    keys, values = (Block(kv.values[i : i + 1], kv.specs[i : i + 1], kv.tokens, kv.heads) for i in (0, 1))
    groups = b.groups(q, kv)
    scores = {}
    for j, k in walk(b, axis, q, keys, channel="k", names=("k",)):
        areas = b.mask.areas(b.mine(mine.tokens), b.mine(k.tokens)) if mine and k else ()
        if areas:
            kernel = Scores(areas, b.shape.softmax_scale, groups)
            scores[j] = b.compute(kernel, *mine.values, *k.values, names=(f"s{j}",))[0], k.tokens
    *rows, lse = (
        b.compute(RowSoftmax(), *(s for s, _ in scores.values()), names=(*(f"p{j}" for j in scores), "lse"))
        if scores
        else (None,)
    )
    weights = dict(zip(scores, rows, strict=True))
    out = None
    for j, v in walk(b, axis, q, values, channel="v", names=("v",)):
        if j in weights:
            v = b.take(v, scores[j][1])
            part = b.compute(Weigh(groups), weights[j], *v.values, names=("out",))[0]
            out = part if out is None else b.compute(Add(((0, part.spec.shape[1]),)), out, part)[0]
    if out is None or lse is None:
        return b.whole(None, b.attention_specs(q), mine.tokens, q.heads)
    return Block((out, lse), (out.spec, lse.spec), mine.tokens, q.heads)


def backward(
    b: AttentionBuilder,
    axis: Axis,
    q: Block,
    kv: Block,
    attend: AttentionBackward,
    *,
    reduce: str = "all_reduce",
) -> tuple[Block, Block]:
    """(q, dout, lse, delta), (k, v) -> (dq), (dk, dv). reduce: "all_reduce" as published, or "reduce_scatter"."""
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce is {reduce!r}; use one of {', '.join(REDUCTIONS)}")
    mine, own, others = b.here(q, axis), b.here(kv, axis), peers(axis)
    dq = dkv = None
    sums: dict[int, Block] = {}
    for j, block in walk(b, axis, q, kv):
        dq_part, dkv_part = attend(b.take(mine, b.seeing(mine.tokens, block.tokens)), block)
        dq = b.add(dq, dq_part, mine.tokens)
        sums[j] = b.take(dkv_part, b.seen_by(block.tokens, mine.tokens))
    shared = {i: b.seen_by(own.tokens, q.tokens[i]) for i in others}
    like = Block((), b.gradient_specs(kv), own.tokens, kv.heads)
    received = b.exchange(
        "reduce_scatter", axis.channel("scatter"), {axis[j]: sums[j] for j in others},
        {axis[i]: (like, shared[i]) for i in others}, ("dk", "dv"),
    )  # fmt: skip
    for i in range(axis.size):
        dkv = b.add(dkv, received[axis[i]] if i != axis.rank else sums[i], own.tokens)
    if reduce == "all_reduce":
        dkv = _gather_all(b, axis, q, kv, b.whole(dkv, b.gradient_specs(kv), own.tokens, kv.heads))
    return (
        b.whole(dq, b.gradient_specs(q)[:1], mine.tokens, q.heads),
        b.whole(dkv, b.gradient_specs(kv), own.tokens, kv.heads),
    )


def _gather_all(b: AttentionBuilder, axis: Axis, q: Block, kv: Block, dkv: Block) -> Block | None:
    """The second half of an all-reduce: every rank gets every rank's sum, of which it keeps its own part."""
    others, r = peers(axis), axis.rank
    seen = [b.seen_by(keys, q.tokens) for keys in kv.tokens]
    own = b.take(dkv, seen[r])
    sends = {axis[i]: own for i in others if b.mine(seen[i])}
    recvs = {axis[i]: (own, seen[i]) for i in others if own}
    received = b.exchange("all_gather", axis.channel("gather"), sends, recvs, ("dk", "dv"))
    if not own:
        return None
    whole, places = b.gather([received[axis[i]] if i != r else own for i in range(axis.size)])
    return b.add(None, b.pick(whole, own.tokens, places[r]), dkv.tokens)
