"""LASP-1: the state of linear attention from rank to rank in a chain (Sun et al. 2024, arXiv 2404.02882).

Every rank waits for the state of all tokens before its own, adds to it and passes it on; backward the gradient of the
state comes the other way. As published, a rank reads from the state and computes what it adds to it (K^T V) only when
it has arrived, so a link of the chain takes longer the more tokens a rank has. With ahead=true it has both at hand and
a link is one addition.

Bytes a rank sends: one state per pass, s = B H D E e (none at the end of the chain), whatever the number of tokens.
"""

from __future__ import annotations

from counterpoint.kernels.linear import Way
from counterpoint.schedule.schedule import Value
from counterpoint.strategies.sequence.linear_builder import Gradients, Inputs, LinearBuilder, State


def forward(
    b: LinearBuilder, x: Inputs, *, ahead: bool = False, wire_dtype: str | None = None
) -> tuple[Value, dict[Way, Value], dict[Way, Value]]:
    """q, k, v, g -> out; and by way the state that arrived and that which this rank added."""
    own: dict[Way, State] = {way: b.chunk_state(way, x) for way in b.ways} if ahead else {}
    out = b.attend(x)
    arrived: dict[Way, Value] = {}
    sources, targets = b.reach.sources, b.reach.targets
    for way in b.ways:
        state = b.recv_state(sources[way], way, wire_dtype)
        if not ahead:
            out = b.read(way, out, x, state)
            own[way] = b.chunk_state(way, x)
        b.send_state(b.after(state, own[way]), targets[way], way, wire_dtype)
        if ahead:
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
    ahead: bool = False,
    wire_dtype: str | None = None,
) -> tuple[Gradients, list[Value]]:
    """dout, and what the forward pass saw and left -> dq, dk, dv by part, dg."""
    own: dict[Way, State] = {way: b.query_state(way, x, dout) for way in b.ways} if ahead else {}
    grads = b.attend_backward(x, dout)
    for way in b.ways:
        grads = b.read_backward(way, grads, x, dout, arrived.get(way))
    dstates: dict[Way, Value | None] = {}
    for way in b.ways:
        dstates[way] = b.recv_state(b.reach.targets[way], way, wire_dtype)
        if not ahead:
            grads = b.state_backward(way, grads, x, dstates[way])
            own[way] = b.query_state(way, x, dout)
        b.send_state(b.after(dstates[way], own[way]), b.reach.sources[way], way, wire_dtype)
        if ahead:
            grads = b.state_backward(way, grads, x, dstates[way])
    return grads, b.gate_backward(grads, x, dstates, left, arrived)
