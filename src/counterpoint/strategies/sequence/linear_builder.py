"""The verbs of sequence-parallel linear attention: the state of a chunk, gather, fold, attend, read.

A `LinearBuilder` hides what the strategies would otherwise repeat: decays or none, documents, ranks without tokens,
and the second way, in which states travel when a token also sees those behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from counterpoint.kernels.attention import Add, accumulator
from counterpoint.kernels.kernel import TensorSpec
from counterpoint.kernels.linear import (
    ChunkDecay,
    ChunkState,
    ChunkStateBackward,
    FoldStates,
    FromState,
    FromStateBackward,
    GateBackward,
    LinearAttend,
    LinearAttendBackward,
    QueryState,
    Rows,
    Way,
)
from counterpoint.kernels.shape import Cast
from counterpoint.kernels.tokens import split_at
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.schedule import Value
from counterpoint.strategies.sequence.layout import SequenceLayout

Decay = Literal["none", "scalar", "vector"]
DECAYS: tuple[Decay, ...] = ("none", "scalar", "vector")


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Sizes of a linear attention: batch rows, heads, dims of keys and values, decay form, dtype name, output scale."""

    batch: int
    heads: int
    key_dim: int
    value_dim: int
    decay: Decay = "none"
    dtype: str = "float32"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if min(self.batch, self.heads, self.key_dim, self.value_dim) < 1:
            raise ValueError(f"batch, heads, key_dim and value_dim must be at least 1, got {self}")
        if self.decay not in DECAYS:
            raise ValueError(f"decay {self.decay!r} is unknown; use one of {', '.join(DECAYS)}")

    @property
    def state(self) -> TensorSpec:
        """Type of a state."""
        return TensorSpec((self.batch, self.heads, self.key_dim, self.value_dim), accumulator(self.dtype))

    @property
    def decay_width(self) -> int:
        """Log decays of a token and head: none, one, or one per channel."""
        return {"none": 0, "scalar": 1, "vector": self.key_dim}[self.decay]


@dataclass(frozen=True, slots=True)
class Reach:
    """What a rank has to do with the others.

    segments: index ranges of its tokens, a document each. sources: by way the ranks whose states reach this one, the
    farthest first. targets: the ranks that its own state reaches, the farthest first. A state reaches up to the end of
    its document.
    """

    segments: tuple[Rows, ...]
    sources: dict[Way, tuple[int, ...]]
    targets: dict[Way, tuple[int, ...]]

    @property
    def whole(self) -> bool:
        """One document covers all tokens of this rank, so that states pass through it."""
        return len(self.segments) == 1

    def first(self, way: Way) -> Rows:
        """The segment that reads what arrives."""
        return self.segments[0] if way == "past" else self.segments[-1]

    def last(self, way: Way) -> Rows:
        """The segment whose state leaves."""
        return self.segments[-1] if way == "past" else self.segments[0]


@lru_cache(maxsize=1024)
def reach(layout: SequenceLayout, rank: int) -> Reach:
    """The reach of a rank. Its tokens must be one run of the sequence, in order."""
    pieces = [split_at(layout.local(r), layout.starts) for r in range(layout.world_size)]
    mine = pieces[rank]
    if not mine:
        return Reach((), {}, {})
    left = [r for r in range(rank) if pieces[r] and pieces[r][-1].document == mine[0].document]
    right = [
        r
        for r in range(layout.world_size - 1, rank, -1)
        if pieces[r] and pieces[r][0].document == mine[-1].document
    ]
    segments = tuple((piece.index, piece.index + piece.run.count) for piece in mine)
    return Reach(
        segments,
        {"past": tuple(left), "future": tuple(right)},
        {"past": tuple(right), "future": tuple(left)},
    )


@dataclass(frozen=True, slots=True)
class Inputs:
    """A rank's q, k (B, S, H, D), v (B, S, H, E) and log decays g (B, S, H, W), if there are any."""

    q: Value
    k: Value
    v: Value
    g: Value | None

    @property
    def gates(self) -> tuple[Value, ...]:
        return () if self.g is None else (self.g,)


@dataclass(frozen=True, slots=True)
class State:
    """A state on its way, (B, H, D, E), and the log decay (B, H, W) over the chunk that it is of, or None."""

    value: Value
    total: Value | None

    @property
    def values(self) -> tuple[Value, ...]:
        return (self.value,) if self.total is None else (self.value, self.total)


Gradients = dict[Way, tuple[Value, Value, Value]]  # dq, dk, dv, by the part of the attention they are of


class LinearBuilder(Builder):
    """A builder that speaks in states. ways: "past", and without a causal mask "future"."""

    def __init__(
        self, name: str, rank: int, shape: LinearShape, layout: SequenceLayout, causal: bool
    ) -> None:
        super().__init__(name, rank, layout.world_size)
        self.shape, self.reach = shape, reach(layout, rank)
        self.ways: tuple[Way, ...] = ("past",) if causal else ("past", "future")
        # without decays both ways are one product
        self.parts: tuple[Way, ...] = ("both",) if not causal and shape.decay == "none" else self.ways

    def part(self, way: Way) -> Way:
        """Under which name the inner attention of a way is computed."""
        return way if way in self.parts else "both"

    # ---- states ----------------------------------------------------------------------------------
    def chunk_state(self, way: Way, x: Inputs) -> State:
        """What this rank's last document adds to the state that leaves it."""
        rows = self.reach.last(way)
        m = self.compute(ChunkState(rows, way), x.k, x.v, *x.gates, names=(f"m.{way}",))[0]
        return State(m, self.decay(rows, x))

    def query_state(self, way: Way, x: Inputs, dout: Value) -> State:
        """The gradient that this rank's first document gives to the state that arrives."""
        rows = self.reach.first(way)
        kernel = QueryState(rows, self.shape.scale, way)
        d = self.compute(kernel, x.q, dout, *x.gates, names=(f"d.{way}",))[0]
        return State(d, self.decay(rows, x))

    def decay(self, rows: Rows, x: Inputs) -> Value | None:
        return None if x.g is None else self.compute(ChunkDecay(rows), x.g, names=("decay",))[0]

    def exchange(
        self,
        kind: str,
        states: dict[Way, State],
        to: dict[Way, tuple[int, ...]],
        source: dict[Way, tuple[int, ...]],
        wire_dtype: str | None,
    ) -> dict[Way, list[State]]:
        """One collective: states go to the ranks that they reach. Returns what arrives, the farthest first."""
        spec = self.shape.state.cast(wire_dtype or self.shape.state.dtype)
        leaving: dict[Way, tuple[Value, ...]] = {}
        for way in self.ways:
            if to[way]:
                # decays matter for what passes through a chunk, so not where a document begins
                passes = self.reach.whole and source[way]
                decay = states[way].values[1:] if passes else ()
                leaving[way] = (self.cast(states[way].value, wire_dtype), *decay)
        sends = {rank: leaving[way] for way in leaving for rank in to[way]}
        recvs = {
            rank: [(f"state{rank}", spec), *((f"decay{rank}", d) for d in (self._decay_spec() if i else ()))]
            for way in self.ways
            for i, rank in enumerate(source[way])
        }
        received = self.collective(kind, "states", sends, recvs)
        return {
            way: [State(received[rank][0], (*received[rank][1:], None)[0]) for rank in source[way]]
            for way in self.ways
        }

    def fold(self, states: Sequence[State]) -> Value | None:
        """Several chunks as one, the farthest first; None of none."""
        dtype = self.shape.state.dtype
        if len(states) < 2:
            return self.cast(states[0].value, dtype) if states else None
        totals = [s.total for s in states[1:] if s.total is not None]
        return self.compute(
            FoldStates(len(states), dtype), *(s.value for s in states), *totals, names=("state",)
        )[0]

    def after(self, arrived: Value | None, own: State) -> State:
        """What leaves this rank, from what has arrived and what it adds; the former only where no document ends."""
        if arrived is None or not self.reach.whole:
            return own
        state = self.fold([State(arrived, None), own])
        assert state is not None
        return State(state, None)

    def cast(self, value: Value, dtype: str | None) -> Value:
        """The value in another dtype; None: as it is."""
        if dtype is None or value.spec.dtype == dtype:
            return value
        return self.compute(Cast(dtype), value)[0]

    def send_state(self, state: State, ranks: Sequence[int], way: Way, wire_dtype: str | None) -> None:
        """Pass a state to the nearest of the ranks that it reaches."""
        if ranks:
            self.send([self.cast(state.value, wire_dtype)], ranks[-1], way)

    def recv_state(self, ranks: Sequence[int], way: Way, wire_dtype: str | None) -> Value | None:
        """What the nearest of the ranks passes on."""
        if not ranks:
            return None
        spec = self.shape.state.cast(wire_dtype or self.shape.state.dtype)
        return self.cast(self.recv([spec], ranks[-1], way, ["arrived"])[0], self.shape.state.dtype)

    def _decay_spec(self) -> list[TensorSpec]:
        width, state = self.shape.decay_width, self.shape.state
        return [TensorSpec((*state.shape[:2], width), state.dtype)] if width else []

    # ---- forward ---------------------------------------------------------------------------------
    def attend(self, x: Inputs) -> Value:
        """The output as if no state came from outside."""
        segments, scale = self.reach.segments, self.shape.scale
        outs = [
            self.compute(LinearAttend(segments, scale, part), x.q, x.k, x.v, *x.gates, names=("out",))[0]
            for part in self.parts
        ]
        return self.total(outs)

    def read(self, way: Way, out: Value, x: Inputs, state: Value | None) -> Value:
        """The output with what the first document reads from the state that arrived."""
        if state is None:
            return out
        kernel = FromState(self.reach.first(way), self.shape.scale, way)
        return self.compute(kernel, out, x.q, state, *x.gates)[0]

    # ---- backward --------------------------------------------------------------------------------
    def attend_backward(self, x: Inputs, dout: Value) -> Gradients:
        segments, scale = self.reach.segments, self.shape.scale
        grads: Gradients = {}
        for part in self.parts:
            kernel = LinearAttendBackward(segments, scale, part)
            dq, dk, dv = self.compute(kernel, x.q, x.k, x.v, dout, *x.gates, names=("dq", "dk", "dv"))
            grads[part] = dq, dk, dv
        return grads

    def read_backward(
        self, way: Way, grads: Gradients, x: Inputs, dout: Value, state: Value | None
    ) -> Gradients:
        """dq with the part that goes through the state that arrived."""
        if state is None:
            return grads
        dq, dk, dv = grads[self.part(way)]
        kernel = FromStateBackward(self.reach.first(way), self.shape.scale, way)
        return {
            **grads,
            self.part(way): (self.compute(kernel, dq, dout, state, *x.gates)[0], dk, dv),
        }

    def state_backward(self, way: Way, grads: Gradients, x: Inputs, dstate: Value | None) -> Gradients:
        """dk, dv with the part that goes through the state that leaves."""
        if dstate is None:
            return grads
        dq, dk, dv = grads[self.part(way)]
        kernel = ChunkStateBackward(self.reach.last(way), way)
        dk, dv = self.compute(kernel, dk, dv, x.k, x.v, dstate, *x.gates)
        return {**grads, self.part(way): (dq, dk, dv)}

    def gate_backward(
        self,
        grads: Gradients,
        x: Inputs,
        dstates: dict[Way, Value | None],
        left: dict[Way, Value],
        arrived: dict[Way, Value],
    ) -> list[Value]:
        """dg from the whole dq and dk; left: what this rank added to the states, arrived: what it was given."""
        if x.g is None:
            return []
        found = []
        for way in self.ways:
            dq, dk, _ = grads[way]
            dstate, end = dstates[way], []
            if dstate is not None:
                end = [dstate, left[way], *([arrived[way]] if self.reach.whole and way in arrived else [])]
            kernel = GateBackward(self.reach.segments, way)
            found += self.compute(kernel, x.q, dq, x.k, dk, x.g, *end, names=("dg",))
        return [self.total(found)]

    def total(self, values: Sequence[Value]) -> Value:
        """The sum of tensors over this rank's tokens."""
        total = values[0]
        for value in values[1:]:
            total = self.compute(Add(((0, total.spec.shape[1]),)), total, value)[0]
        return total
