"""Linear maps of a transformer and their gradients, also with a low-rank adapter beside a frozen weight.

Shapes: x (B, S, in), weight (out, in), y (B, S, out); adapter a (r, in), b (out, r).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from counterpoint.kernels.kernel import Kernel, TensorSpec, ViewKernel, Work, register, torch_dtype


def _product(*inputs: TensorSpec) -> int:
    """Floating-point operations of rows times a weight (out, in): rows are those of the first input."""
    rows, weight = inputs[0], inputs[1]
    return 2 * prod(rows.shape[:-1]) * prod(weight.shape)


@register("view")
@dataclass(frozen=True, slots=True)
class View(ViewKernel):
    """The same numbers with other dims behind the first two, and with `lead` also other first two."""

    tail: tuple[int, ...]
    lead: tuple[int, ...] = ()

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (TensorSpec((*(self.lead or inputs[0].shape[:2]), *self.tail), inputs[0].dtype),)

    def run(self, *inputs):
        return (inputs[0].reshape(*(self.lead or inputs[0].shape[:2]), *self.tail),)


@register("linear")
@dataclass(frozen=True, slots=True)
class Linear(Kernel):
    """(x, weight[, bias]) -> y = x weight^T + bias."""

    operator: ClassVar[str] = "matmul"

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        x, weight = inputs[:2]
        return (TensorSpec((*x.shape[:-1], weight.shape[0]), x.dtype),)

    def work(self, *inputs: TensorSpec) -> Work:
        return Work(_product(*inputs), sum(x.nbytes for x in inputs), self.outputs(*inputs)[0].nbytes)

    def run(self, *inputs):
        import torch.nn.functional as F

        return (F.linear(*inputs),)


@register("linear_input")
@dataclass(frozen=True, slots=True)
class LinearInput(Kernel):
    """(dy, weight) -> dx = dy weight."""

    operator: ClassVar[str] = "matmul"

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        dy, weight = inputs
        return (TensorSpec((*dy.shape[:-1], weight.shape[1]), dy.dtype),)

    def work(self, *inputs: TensorSpec) -> Work:
        return Work(_product(*inputs), sum(x.nbytes for x in inputs), self.outputs(*inputs)[0].nbytes)

    def run(self, *inputs):
        dy, weight = inputs
        return (dy @ weight,)


@register("linear_weight")
@dataclass(frozen=True, slots=True)
class LinearWeight(Kernel):
    """(dy, x) -> dweight = dy^T x[, dbias]."""

    bias: bool = False
    operator: ClassVar[str] = "matmul"

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        dy, x = inputs
        weight = TensorSpec((dy.shape[-1], x.shape[-1]), x.dtype)
        return (weight, TensorSpec((dy.shape[-1],), x.dtype)) if self.bias else (weight,)

    def work(self, *inputs: TensorSpec) -> Work:
        dy, x = inputs
        flops = 2 * prod(x.shape) * dy.shape[-1]
        return Work(flops, dy.nbytes + x.nbytes, sum(y.nbytes for y in self.outputs(*inputs)))

    def run(self, *inputs):
        dy, x = (t.reshape(-1, t.shape[-1]) for t in inputs)
        return (dy.T @ x, dy.sum(0)) if self.bias else (dy.T @ x,)


@register("lora")
@dataclass(frozen=True, slots=True)
class Lora(Kernel):
    """(x, weight, a, b) -> (y, u): u = x a^T, y = x weight^T + scale u b^T (LoRA, arXiv 2106.09685)."""

    scale: float = 1.0
    operator: ClassVar[str] = "matmul"

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        x, weight, a, _ = inputs
        lead = x.shape[:-1]
        return TensorSpec((*lead, weight.shape[0]), x.dtype), TensorSpec((*lead, a.shape[0]), x.dtype)

    def work(self, *inputs: TensorSpec) -> Work:
        x, weight, a, b = inputs
        flops = 2 * prod(x.shape[:-1]) * (prod(weight.shape) + prod(a.shape) + prod(b.shape))
        return Work(flops, sum(t.nbytes for t in inputs), sum(y.nbytes for y in self.outputs(*inputs)))

    def run(self, *inputs):
        import torch.nn.functional as F

        x, weight, a, b = inputs
        u = F.linear(x, a.to(x.dtype))
        return F.linear(x, weight) + self.scale * F.linear(u, b.to(x.dtype)), u


@register("lora_backward")
@dataclass(frozen=True, slots=True)
class LoraBackward(Kernel):
    """(dy, x, u, weight, a, b) -> (dx, da, db) of `Lora`; the weight is frozen."""

    scale: float = 1.0
    operator: ClassVar[str] = "matmul"

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        dy, x, _, _, a, b = inputs
        return TensorSpec(x.shape, dy.dtype), a, b

    def work(self, *inputs: TensorSpec) -> Work:
        dy, _, _, weight, a, b = inputs
        flops = 2 * prod(dy.shape[:-1]) * (prod(weight.shape) + 2 * prod(a.shape) + 2 * prod(b.shape))
        return Work(flops, sum(t.nbytes for t in inputs), sum(y.nbytes for y in self.outputs(*inputs)))

    def run(self, *inputs):
        dy, x, u, weight, a, b = inputs
        du = self.scale * (dy @ b.to(dy.dtype))
        rows = [t.reshape(-1, t.shape[-1]) for t in (dy, x, u, du)]
        da, db = rows[3].T @ rows[1], self.scale * (rows[0].T @ rows[2])
        return dy @ weight + du @ a.to(dy.dtype), da.to(a.dtype), db.to(b.dtype)


@register("total")
@dataclass(frozen=True, slots=True)
class Total(Kernel):
    """Parts of equal shape -> their sum, in the order given, in `dtype`."""

    dtype: str

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0].cast(self.dtype),)

    def run(self, *inputs):
        total = inputs[0].to(torch_dtype(self.dtype), copy=True)
        for part in inputs[1:]:
            total += part
        return (total,)
