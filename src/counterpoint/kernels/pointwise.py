"""Kernels that work on every element alone: activation, products, sums, and writing into rows of a buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from counterpoint.kernels.kernel import Kernel, TensorSpec, ViewKernel, Work, register


@register("silu")
@dataclass(frozen=True, slots=True)
class Silu(Kernel):
    """gate -> gate sigmoid(gate)."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0],)

    def run(self, *inputs):
        import torch.nn.functional as F

        return (F.silu(inputs[0]),)


@register("silu_backward")
@dataclass(frozen=True, slots=True)
class SiluBackward(Kernel):
    """(dsilu, gate) -> dgate."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[1],)

    def run(self, *inputs):
        import torch

        return (torch.ops.aten.silu_backward(*inputs),)


@register("multiply")
@dataclass(frozen=True, slots=True)
class Multiply(Kernel):
    """(a, b) -> a b."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0],)

    def run(self, *inputs):
        return (inputs[0] * inputs[1],)


@register("multiply_backward")
@dataclass(frozen=True, slots=True)
class MultiplyBackward(Kernel):
    """(dproduct, a, b) -> (da, db)."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return inputs[1:]

    def run(self, *inputs):
        d, a, b = inputs
        return d * b, d * a


@register("sum")
@dataclass(frozen=True, slots=True)
class Sum(Kernel):
    """(a, b) -> a + b."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0],)

    def run(self, *inputs):
        return (inputs[0] + inputs[1],)


@register("accumulate")
@dataclass(frozen=True, slots=True)
class Accumulate(Kernel):
    """(total, part) -> total with the part added, in place."""

    mutates: ClassVar[bool] = True

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return inputs[:1]

    @property
    def aliases(self) -> dict[int, int]:
        return {0: 0}

    def work(self, *inputs: TensorSpec) -> Work:
        total, part = inputs
        return Work(0, total.nbytes + part.nbytes, total.nbytes)

    def run(self, *inputs):
        inputs[0].add_(inputs[1])
        return (inputs[0],)


@register("write")
@dataclass(frozen=True, slots=True)
class Write(Kernel):
    """(whole, part) -> whole with tokens `start` to `stop` replaced by the part, in place."""

    start: int
    stop: int
    mutates: ClassVar[bool] = True

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return inputs[:1]

    @property
    def aliases(self) -> dict[int, int]:
        return {0: 0}

    def work(self, *inputs: TensorSpec) -> Work:
        return Work(0, inputs[1].nbytes, inputs[1].nbytes)

    def run(self, *inputs):
        inputs[0][:, self.start : self.stop] = inputs[1]
        return (inputs[0],)


@register("empty")
@dataclass(frozen=True, slots=True)
class Empty(Kernel):
    """like -> a buffer of `spec` on the same device, not filled: nothing is launched for it."""

    spec: TensorSpec
    zero: bool = False

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (self.spec,)

    def work(self, *inputs: TensorSpec) -> Work:
        return Work(0, 0, self.spec.nbytes if self.zero else 0)

    def run(self, *inputs):
        from counterpoint.kernels.kernel import torch_dtype

        make = inputs[0].new_zeros if self.zero else inputs[0].new_empty
        return (make(self.spec.shape, dtype=torch_dtype(self.spec.dtype)),)


@register("after")
@dataclass(frozen=True, slots=True)
class After(ViewKernel):
    """(value, other) -> the value, once the other exists: order where there is no flow of data."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return inputs[:1]

    def run(self, *inputs):
        return inputs[:1]
