"""Parameters and gradients as one row of numbers, for sharding (ZeRO, arXiv 1910.02054), and the optimizer's update."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from counterpoint.kernels.kernel import Kernel, TensorSpec, ViewKernel, Work, register, torch_dtype


@register("flatten")
@dataclass(frozen=True, slots=True)
class Flatten(Kernel):
    """Tensors -> their numbers in one row of `size`, zeros at its end, in `dtype`."""

    size: int
    dtype: str

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (TensorSpec((self.size,), self.dtype),)

    def run(self, *inputs):
        row = inputs[0].new_zeros(self.size, dtype=torch_dtype(self.dtype))
        done = 0
        for x in inputs:
            row[done : done + x.numel()] = x.reshape(-1)
            done += x.numel()
        return (row,)


@register("flat_part")
@dataclass(frozen=True, slots=True)
class FlatPart(ViewKernel):
    """A stretch of a row, seen in a shape."""

    start: int
    shape: tuple[int, ...]

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (TensorSpec(self.shape, inputs[0].dtype),)

    def run(self, *inputs):
        return (inputs[0][self.start : self.start + prod(self.shape)].view(self.shape),)


@register("flat_join")
@dataclass(frozen=True, slots=True)
class FlatJoin(Kernel):
    """Rows -> one row; `order` says which input comes first, second, ..."""

    order: tuple[int, ...]

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (TensorSpec((sum(x.shape[0] for x in inputs),), inputs[0].dtype),)

    def run(self, *inputs):
        import torch

        return (torch.cat([inputs[i] for i in self.order]),)


@register("unflatten")
@dataclass(frozen=True, slots=True)
class Unflatten(Kernel):
    """(row, tensors) -> the tensors with the numbers of the row, in place."""

    tensors: int
    mutates: ClassVar[bool] = True

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return inputs[1:]

    @property
    def aliases(self) -> dict[int, int]:
        return {i: i + 1 for i in range(self.tensors)}

    def work(self, *inputs: TensorSpec) -> Work:
        moved = sum(x.nbytes for x in inputs[1:])
        return Work(0, moved, moved)

    def run(self, *inputs):
        row, done = inputs[0], 0
        for x in inputs[1:]:
            x.copy_(row[done : done + x.numel()].view(x.shape))
            done += x.numel()
        return tuple(inputs[1:])


@register("adamw")
@dataclass(frozen=True, slots=True)
class AdamW(Kernel):
    """(parameters, gradients, m, v[, master]) -> the same three or four rows, updated in place (arXiv 1711.05101).

    With a master copy the update is made there, and the parameters are its rounding. step counts from 1.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decay: float = 0.0
    step: int = 1
    master: bool = False
    mutates: ClassVar[bool] = True

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0], *inputs[2:])

    @property
    def aliases(self) -> dict[int, int]:
        return {0: 0, 1: 2, 2: 3, **({3: 4} if self.master else {})}

    def work(self, *inputs: TensorSpec) -> Work:
        kept = [inputs[0], *inputs[2:]]
        return Work(12 * prod(inputs[0].shape), sum(x.nbytes for x in inputs), sum(x.nbytes for x in kept))

    def run(self, *inputs):
        p, g, m, v = inputs[:4]
        target = inputs[4] if self.master else p
        g = g.to(m.dtype)
        m.lerp_(g, 1 - self.betas[0])
        v.mul_(self.betas[1]).addcmul_(g, g, value=1 - self.betas[1])
        mean = m / (1 - self.betas[0] ** self.step)
        root = (v / (1 - self.betas[1] ** self.step)).sqrt_().add_(self.eps)
        target.mul_(1 - self.lr * self.decay).sub_((self.lr * mean / root).to(target.dtype))
        if self.master:
            p.copy_(target)
        return (p, *inputs[2:])
