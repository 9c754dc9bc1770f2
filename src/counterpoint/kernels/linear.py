"""Linear attention kernels of a schedule: the state of a chunk, attention inside it, what a state from outside adds.

Shapes: q, k (B, S, H, D), v, dout (B, S, H, E), log decays g (B, S, H, W) with W = 1 (per head) or D (per channel) or
missing, states (B, H, D, E) and log decays of a whole chunk (B, H, W) in the accumulator's dtype. See `linear_blocks`.

Segments are the index ranges of this rank's tokens that lie in one document each; nothing passes from one to another.
A way is "past" (a token sees itself and those before it), "future" (those behind it) or, only without decays, "both".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from counterpoint.kernels.attention import accumulator
from counterpoint.kernels.kernel import Kernel, TensorSpec, Work, register, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

Rows = tuple[int, int]
Way = Literal["past", "future", "both"]
SUB_CHUNK = {False: 64, True: 16}  # as in linear_blocks: pairs that are multiplied out, by decays per channel


@register("chunk_state")
@dataclass(frozen=True, slots=True)
class ChunkState(Kernel):
    """(k, v[, g]) -> the state that the tokens `rows` leave behind: (k times the decays behind it)^T v."""

    rows: Rows
    way: Way = "past"
    operator: ClassVar[str] = "matmul"

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (_state(*inputs[:2]),)

    def work(self, *inputs: TensorSpec) -> Work:
        return _product(self, inputs, self.rows, inputs[:2], 1)

    def run(self, *inputs):
        from counterpoint.kernels import linear_blocks as blocks

        k, v, g = _turned(self.way, self.rows, *inputs[:2], gates=inputs[2:])
        state = blocks.state_of(k, v, g)
        if g is not None and self.way == "future":  # the decay of the first token lies behind the stretch
            state = state * _gates(inputs[2], self.rows)[:, :, 0].exp().unsqueeze(-1)
        return (state,)


@register("chunk_decay")
@dataclass(frozen=True, slots=True)
class ChunkDecay(Kernel):
    """(g) -> the log decay over the tokens `rows`: (B, H, W)."""

    rows: Rows

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        batch, _, *rest = inputs[0].shape
        return (TensorSpec((batch, *rest), accumulator(inputs[0].dtype)),)

    def work(self, *inputs: TensorSpec) -> Work:
        read = inputs[0].with_size(1, self.rows[1] - self.rows[0])
        return Work(prod(read.shape), read.nbytes, self.outputs(*inputs)[0].nbytes)

    def run(self, *inputs):
        return (_gates(inputs[0], self.rows).sum(2),)


@register("query_state")
@dataclass(frozen=True, slots=True)
class QueryState(Kernel):
    """(q, dout[, g]) -> the gradient of the state that the tokens `rows` were given: (q under its decays)^T dout."""

    rows: Rows
    scale: float
    way: Way = "past"
    operator: ClassVar[str] = "matmul"

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (_state(*inputs[:2]),)

    def work(self, *inputs: TensorSpec) -> Work:
        return _product(self, inputs, self.rows, inputs[:2], 1)

    def run(self, *inputs):
        from counterpoint.kernels import linear_blocks as blocks

        q, dout, g = _turned(self.way, self.rows, *inputs[:2], gates=inputs[2:])
        return ((blocks.decayed_from_start(q, g) * self.scale).transpose(-1, -2) @ dout,)


@register("fold_states")
@dataclass(frozen=True, slots=True)
class FoldStates(Kernel):
    """(states of several chunks, the farthest first, log decays of all but the first) -> the state behind them.

    M = (prod of decays) M_0 + ... + M_n; without decays their sum.
    """

    states: int
    dtype: str = "float32"

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0].cast(self.dtype),)

    def work(self, *inputs: TensorSpec) -> Work:
        made = self.outputs(*inputs)[0]
        each = 2 if len(inputs) > self.states else 1
        flops = each * (self.states - 1) * prod(made.shape)
        return Work(flops, sum(x.nbytes for x in inputs), made.nbytes)

    def run(self, *inputs):
        from counterpoint.kernels import linear_blocks as blocks

        dtype = torch_dtype(self.dtype)
        states = [x.to(dtype) for x in inputs[: self.states]]
        state = blocks.fold(states, [x.to(dtype) for x in inputs[self.states :]])
        return (state.clone() if state is inputs[0] else state,)

    def label(self) -> str:
        return f"fold {self.states}"


@register("linear_attend")
@dataclass(frozen=True, slots=True)
class LinearAttend(Kernel):
    """(q, k, v[, g]) -> the output inside every segment, as if no state came from outside."""

    segments: tuple[Rows, ...]
    scale: float
    way: Way = "past"
    operator: ClassVar[str] = "matmul"

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        v = inputs[2]
        return (v.cast(accumulator(v.dtype)),)

    def work(self, *inputs: TensorSpec) -> Work:
        return _inner_work(self, inputs, self.way, 2)

    def run(self, *inputs):
        from counterpoint.kernels import linear_blocks as blocks

        q, k, v = inputs[:3]
        out = v.new_empty(v.shape, dtype=torch_dtype(accumulator(_name(v))))
        for rows in self.segments:
            q, k, v, g = _turned(self.way, rows, *inputs[:3], gates=inputs[3:])
            if self.way == "both":
                part = (q * self.scale) @ blocks.state_of(k, v, None)
            else:
                part = blocks.attend(q * self.scale, k, v, g, self.way == "future")
            _rows_of(out, rows)[:] = _back(self.way, part)
        return (out,)


@register("linear_attend_backward")
@dataclass(frozen=True, slots=True)
class LinearAttendBackward(Kernel):
    """(q, k, v, dout[, g]) -> (dq, dk, dv) of `LinearAttend`."""

    segments: tuple[Rows, ...]
    scale: float
    way: Way = "past"
    operator: ClassVar[str] = "matmul"

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return tuple(x.cast(accumulator(x.dtype)) for x in inputs[:3])

    def work(self, *inputs: TensorSpec) -> Work:
        return _inner_work(self, inputs, self.way, 5)

    def run(self, *inputs):
        from counterpoint.kernels import linear_blocks as blocks

        dtype = torch_dtype(accumulator(_name(inputs[0])))
        grads = tuple(x.new_empty(x.shape, dtype=dtype) for x in inputs[:3])
        for rows in self.segments:
            q, k, v, dout, g = _turned(self.way, rows, *inputs[:4], gates=inputs[4:])
            dout = dout * self.scale
            if self.way == "both":
                state, dstate = blocks.state_of(k, v, None), q.transpose(-1, -2) @ dout
                parts = dout @ state.transpose(-1, -2), v @ dstate.transpose(-1, -2), k @ dstate
            else:
                parts = blocks.attend_backward(q, k, v, g, dout, self.way == "future")
            for grad, part in zip(grads, parts, strict=True):
                _rows_of(grad, rows)[:] = _back(self.way, part)
        return grads


@register("from_state")
@dataclass(frozen=True, slots=True)
class FromState(Kernel):
    """(out, q, state[, g]) -> out with what the tokens `rows` read from the state added, in place."""

    rows: Rows
    scale: float
    way: Way = "past"
    operator: ClassVar[str] = "matmul"
    mutates: ClassVar[bool] = True

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return inputs[:1]

    @property
    def aliases(self) -> dict[int, int]:
        return {0: 0}

    def work(self, *inputs: TensorSpec) -> Work:
        return _product(self, inputs, self.rows, (inputs[1], inputs[0]), 1)

    def run(self, *inputs):
        from counterpoint.kernels import linear_blocks as blocks

        out, q, state, *gates = inputs
        q, g = _turned(self.way, self.rows, q, gates=gates)
        _rows_of(out, self.rows)[:] += _back(self.way, (blocks.decayed_from_start(q, g) * self.scale) @ state)
        return (out,)


@register("from_state_backward")
@dataclass(frozen=True, slots=True)
class FromStateBackward(Kernel):
    """(dq, dout, state[, g]) -> dq with the gradient of `FromState` added, in place."""

    rows: Rows
    scale: float
    way: Way = "past"
    operator: ClassVar[str] = "matmul"
    mutates: ClassVar[bool] = True

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return inputs[:1]

    @property
    def aliases(self) -> dict[int, int]:
        return {0: 0}

    def work(self, *inputs: TensorSpec) -> Work:
        return _product(self, inputs, self.rows, inputs[:2], 1)

    def run(self, *inputs):
        from counterpoint.kernels import linear_blocks as blocks

        dq, dout, state, *gates = inputs
        dout, g = _turned(self.way, self.rows, dout, gates=gates)
        part = blocks.decayed_from_start(dout @ (state * self.scale).transpose(-1, -2), g)
        _rows_of(dq, self.rows)[:] += _back(self.way, part)
        return (dq,)


@register("chunk_state_backward")
@dataclass(frozen=True, slots=True)
class ChunkStateBackward(Kernel):
    """(dk, dv, k, v, dstate[, g]) -> (dk, dv) with the gradient of `ChunkState` added, in place."""

    rows: Rows
    way: Way = "past"
    operator: ClassVar[str] = "matmul"
    mutates: ClassVar[bool] = True

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return inputs[:2]

    @property
    def aliases(self) -> dict[int, int]:
        return {0: 0, 1: 1}

    def work(self, *inputs: TensorSpec) -> Work:
        return _product(self, inputs, self.rows, inputs[:2], 2)

    def run(self, *inputs):
        from counterpoint.kernels import linear_blocks as blocks

        dk, dv, k, v, dstate, *gates = inputs
        if gates and self.way == "future":
            dstate = dstate * _gates(gates[0], self.rows)[:, :, 0].exp().unsqueeze(-1)
        k, v, g = _turned(self.way, self.rows, k, v, gates=gates)
        _rows_of(dk, self.rows)[:] += _back(self.way, blocks.decayed_to_end(v @ dstate.transpose(-1, -2), g))
        _rows_of(dv, self.rows)[:] += _back(self.way, blocks.decayed_to_end(k, g) @ dstate)
        return dk, dv


@register("gate_backward")
@dataclass(frozen=True, slots=True)
class GateBackward(Kernel):
    """(q, dq, k, dk, g[, dstate, m][, state]) -> dg, from the whole dq and dk of a way.

    dstate: the gradient of the state that leaves the rank, m: what this rank added to it, state: what it was given, if
    any of that leaves it again. Without them nothing leaves, or nobody reads it.
    """

    segments: tuple[Rows, ...]
    way: Way = "past"

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        g = inputs[4]
        return (g.cast(accumulator(g.dtype)),)

    def work(self, *inputs: TensorSpec) -> Work:
        made = self.outputs(*inputs)[0]
        return Work(4 * prod(inputs[1].shape), sum(x.nbytes for x in inputs), made.nbytes)

    def run(self, *inputs):
        import torch

        from counterpoint.kernels import linear_blocks as blocks

        g = inputs[4]
        dg = g.new_empty(g.shape, dtype=torch_dtype(accumulator(_name(g))))
        last = self.segments[-1] if self.way == "past" else self.segments[0]
        for rows in self.segments:
            q, dq, k, dk = _turned(self.way, rows, *inputs[:4])
            end = None
            if rows == last and len(inputs) > 5:
                dstate, leaving, *arrived = inputs[5:]
                if arrived:
                    leaving = leaving + _gates(g, rows).sum(2).exp().unsqueeze(-1) * arrived[0]
                end = (dstate * leaving).sum(-1)
            made = blocks.gate_gradient(q, dq, k, dk, end, g.shape[-1])
            if self.way == "future":
                # in the flipped sequence decays have moved by one; the first token's stands behind all of them
                first = torch.zeros_like(made[:, :, :1])
                if end is not None:
                    first = (end if g.shape[-1] > 1 else end.sum(-1, keepdim=True)).unsqueeze(2)
                made = torch.cat([first, made[:, :, 1:].flip(2)], 2)
            _rows_of(dg, rows)[:] = made
        return (dg,)


# ---- helpers -------------------------------------------------------------------------------------------
def _state(k: TensorSpec, v: TensorSpec) -> TensorSpec:
    batch, _, heads, dim = k.shape
    return TensorSpec((batch, heads, dim, v.shape[3]), accumulator(k.dtype))


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _product(
    kernel: Kernel, inputs: tuple[TensorSpec, ...], rows: Rows, pair: tuple[TensorSpec, ...], count: int
) -> Work:
    """`count` products of `rows` tokens with or into a state; of tensors over tokens only these rows are touched."""
    (batch, _, heads, a), b = pair[0].shape, pair[1].shape[3]
    tokens = rows[1] - rows[0]

    def nbytes(specs: tuple[TensorSpec, ...]) -> int:
        return sum(x.with_size(1, tokens).nbytes if _over_tokens(x) else x.nbytes for x in specs)

    def _over_tokens(x: TensorSpec) -> bool:
        return len(x.shape) == 4 and x.shape[1:3] == pair[0].shape[1:3]

    flops = count * 2 * batch * tokens * heads * a * b
    return Work(flops, nbytes(inputs), nbytes(kernel.outputs(*inputs)))


def _inner_work(kernel: Kernel, inputs: tuple[TensorSpec, ...], way: Way, products: int) -> Work:
    """Pairs inside sub-chunks, and a state per sub-chunk that is written once and read `products - 1` times or more."""
    (batch, tokens, heads, dim), value_dim = inputs[0].shape, inputs[2].shape[3]
    gates = inputs[-1] if len(inputs) > (3 if products == 2 else 4) else None
    chunk = SUB_CHUNK[gates is not None and gates.shape[-1] > 1]
    through_state = 2 * products * dim * value_dim
    pairs = 0 if way == "both" else 2 * chunk * (dim + value_dim) * (1 if products == 2 else 2)
    flops = batch * tokens * heads * (through_state + pairs)
    return Work(flops, sum(x.nbytes for x in inputs), sum(y.nbytes for y in kernel.outputs(*inputs)))


def _gates(g: Tensor, rows: Rows) -> Tensor:
    """(B, H, S, W) log decays of some tokens. A decay of 0 becomes one that is 0 in floating point."""
    dtype = torch_dtype(accumulator(_name(g)))
    lowest = -800.0 if g.element_size() == 8 else -100.0
    return g[:, rows[0] : rows[1]].transpose(1, 2).to(dtype).clamp(min=lowest)


def _turned(way: Way, rows: Rows, *tensors: Tensor, gates: Sequence[Tensor] | None = None) -> list[Any]:
    """Some tokens of tensors, heads first, in the order of the way; with `gates` also their log decays or None."""
    from counterpoint.kernels.linear_blocks import flipped

    dtype = torch_dtype(accumulator(_name(tensors[0])))
    turn: Callable[[Any], Any] = (lambda x: x.flip(2)) if way == "future" else (lambda x: x)
    made: list[Any] = [turn(x[:, rows[0] : rows[1]].transpose(1, 2).to(dtype)) for x in tensors]
    if gates is None:
        return made
    if not gates:
        return [*made, None]
    g = _gates(gates[0], rows)
    return [*made, flipped(g) if way == "future" else g]


def _rows_of(x: Tensor, rows: Rows) -> Tensor:
    """A view (B, H, S, D) of some tokens of a tensor (B, S, H, D)."""
    return x[:, rows[0] : rows[1]].transpose(1, 2)


def _back(way: Way, x: Tensor) -> Tensor:
    return x.flip(2) if way == "future" else x
