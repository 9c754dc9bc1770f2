"""LASP-2: every rank's state of linear attention to all ranks at once (Sun et al. 2025, arXiv 2502.07563).

Rank t holds chunk t of the sequence. M_t = K_t^T V_t under its decays is all that later tokens need of it, with the
decay A_t over the chunk: (A_t, M_t) is the affine map by which the chunk changes a state. While the one all-gather of
these is under way the chunk attends to itself; then M_<t = sum over j < t of (prod of A_i, j < i < t) M_j is folded and
the queries read it. Backward the same with D_t = Q_t^T dO_t and a suffix.

Without a causal mask states travel both ways: a rank sends what later tokens need of it to the right, and what earlier
ones need to the left. A document's start resets the state, so a state travels as far as its document does.

Bytes a rank sends to each rank that its state reaches: s = B H D E e of a state in the accumulator's dtype (e = 4, or
that of wire_dtype), plus 4 B H W, W = 0, 1 or D, for log decays, which the first rank of a document does not send. One
document over N ranks: causal N-1-r times forward, r times backward, (N-1)/2 on average; not causal N-1 times. They do
not depend on the number of tokens. One collective per pass.
"""

from __future__ import annotations

from counterpoint.kernels.linear import Way
from counterpoint.schedule.schedule import Value
from counterpoint.strategies.sequence.linear_builder import Gradients, Inputs, LinearBuilder, State


def forward(
    b: LinearBuilder, x: Inputs, *, wire_dtype: str | None = None
) -> tuple[Value, dict[Way, Value], dict[Way, Value]]:
    """q, k, v, g -> out; and by way the state that arrived and that which this rank added."""
    own: dict[Way, State] = {way: b.chunk_state(way, x) for way in b.ways}
    states = b.exchange("all_gather", own, b.reach.targets, b.reach.sources, wire_dtype)
    out = b.attend(x)
    arrived: dict[Way, Value] = {}
    for way in b.ways:
        state = b.fold(states[way])
        out = b.read(way, out, x, state)
        if state is not None:
            arrived[way] = state
    left: dict[Way, Value] = {way: state.value for way, state in own.items()}
    return out, arrived, left


def backward(
    b: LinearBuilder,
    x: Inputs,
    dout: Value,
    arrived: dict[Way, Value],
    left: dict[Way, Value],
    *,
    wire_dtype: str | None = None,
) -> tuple[Gradients, list[Value]]:
    """dout, and what the forward pass saw and left -> dq, dk, dv by part, dg."""
    own: dict[Way, State] = {way: b.query_state(way, x, dout) for way in b.ways}
    states = b.exchange("all_gather", own, b.reach.sources, b.reach.targets, wire_dtype)
    grads = b.attend_backward(x, dout)
    for way in b.ways:
        grads = b.read_backward(way, grads, x, dout, arrived.get(way))
    dstates: dict[Way, Value | None] = {way: b.fold(states[way]) for way in b.ways}
    for way in b.ways:
        grads = b.state_backward(way, grads, x, dstates[way])
    return grads, b.gate_backward(grads, x, dstates, left, arrived)
