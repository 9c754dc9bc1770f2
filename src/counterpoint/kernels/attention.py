"""Attention kernels of a schedule: one block forward, one block backward, merges of partial results.

Shapes as in `kernels.blocks`: q, out, dout (B, S, H, D); k, v (B, T, G, D); lse, delta (B, S, H) float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from counterpoint.kernels.kernel import Kernel, TensorSpec, Work, register
from counterpoint.kernels.mask import Area

Ranges = tuple[tuple[int, int], ...]


def accumulator(dtype: str) -> str:
    """The dtype in which partial results of a dtype are merged and summed."""
    return "float64" if dtype == "float64" else "float32"


@register("attend")
@dataclass(frozen=True, slots=True)
class Attend(Kernel):
    """(q, k, v) -> (out, lse) over the visible areas of the block. 4 pairs H D floating-point operations."""

    areas: tuple[Area, ...]
    scale: float
    groups: tuple[int, ...] = ()
    operator: ClassVar[str] = "attention_forward"

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        q = inputs[0]
        return q, TensorSpec(q.shape[:3], accumulator(q.dtype))

    def work(self, *inputs: TensorSpec) -> Work:
        batch, _, heads, dim = inputs[0].shape
        pairs = sum(a.pairs for a in self.areas)
        written = sum(y.nbytes for y in self.outputs(*inputs))
        return Work(4 * pairs * batch * heads * dim, sum(x.nbytes for x in inputs), written)

    def run(self, *inputs):
        from counterpoint.kernels import blocks

        q, k, v = inputs
        return blocks.attend(q, k, v, self.areas, scale=self.scale, groups=self.groups)

    def label(self) -> str:
        return f"attend {_brief(self.areas)}"


@register("attend_backward")
@dataclass(frozen=True, slots=True)
class AttendBackward(Kernel):
    """(q, dout, lse, delta or out, k, v) -> (dq, dk, dv), float32. 10 pairs H D floating-point operations.

    P = exp(scale q k^T - lse), dv = P^T dout, dS = P (dout v^T - delta), dq = scale dS k, dk = scale dS^T q.
    """

    areas: tuple[Area, ...]
    scale: float
    groups: tuple[int, ...] = ()
    has_out: bool = False  # the fourth input is the output, not delta
    narrow: bool = False  # results in the dtypes of q, k, v: nothing will be added to them
    operator: ClassVar[str] = "attention_backward"

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        q, _, _, _, k, v = inputs
        return (q, k, v) if self.narrow else tuple(x.cast(accumulator(x.dtype)) for x in (q, k, v))

    def work(self, *inputs: TensorSpec) -> Work:
        batch, _, heads, dim = inputs[0].shape
        pairs = sum(a.pairs for a in self.areas)
        written = sum(y.nbytes for y in self.outputs(*inputs))
        return Work(10 * pairs * batch * heads * dim, sum(x.nbytes for x in inputs), written)

    def run(self, *inputs):
        from counterpoint.kernels import blocks

        q, dout, lse, row, k, v = inputs
        assert row.ndim == (4 if self.has_out else 3)
        grads = blocks.attend_backward(
            dout, q, k, v, row, lse, self.areas, scale=self.scale, groups=self.groups
        )
        return tuple(g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)) if self.narrow else grads

    def label(self) -> str:
        return f"backward {_brief(self.areas)}"


@register("delta")
@dataclass(frozen=True, slots=True)
class Delta(Kernel):
    """(dout, out) -> D = rowsum(dout * out), float32."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (TensorSpec(inputs[0].shape[:3], accumulator(inputs[0].dtype)),)

    def run(self, *inputs):
        from counterpoint.kernels import blocks

        return (blocks.row_delta(*inputs),)


@register("merge")
@dataclass(frozen=True, slots=True)
class Merge(Kernel):
    """(out, lse, part, part_lse) -> (out, lse) with the part folded into the rows `rows`, in place."""

    rows: Ranges
    mutates: ClassVar[bool] = True

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return inputs[:2]

    @property
    def aliases(self) -> dict[int, int]:
        return {0: 0, 1: 1}

    def work(self, *inputs: TensorSpec) -> Work:
        touched = inputs[2].nbytes + inputs[3].nbytes
        return Work(3 * prod(inputs[2].shape), 2 * touched, touched)

    def run(self, *inputs):
        from counterpoint.kernels import blocks

        out, lse, part, part_lse = inputs
        done = 0
        for a, b in self.rows:
            here = slice(done, done + b - a)
            blocks.merge(out[:, a:b], lse[:, a:b], part[:, here], part_lse[:, here])
            done += b - a
        return out, lse


@register("add")
@dataclass(frozen=True, slots=True)
class Add(Kernel):
    """(total, part) -> total with the part added to the rows `rows`, in place."""

    rows: Ranges
    mutates: ClassVar[bool] = True

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return inputs[:1]

    @property
    def aliases(self) -> dict[int, int]:
        return {0: 0}

    def work(self, *inputs: TensorSpec) -> Work:
        return Work(0, 2 * inputs[1].nbytes, inputs[1].nbytes)

    def run(self, *inputs):
        total, part = inputs
        done = 0
        for a, b in self.rows:
            total[:, a:b] += part[:, done : done + b - a]
            done += b - a
        return (total,)


def _brief(areas: tuple[Area, ...]) -> str:
    shown = ", ".join(a.label() for a in areas[:2])
    return shown + (f" and {len(areas) - 2} more" if len(areas) > 2 else "")
