"""Kernels that rearrange tensors along tokens (dim 1) and heads (dim 2), without arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from counterpoint.kernels.kernel import Kernel, TensorSpec, ViewKernel, Work, register, torch_dtype

Ranges = tuple[tuple[int, int], ...]
Place = tuple[
    int, int, int, int
]  # first index in the part, count, first index in the whole, stride in the whole


@register("take")
@dataclass(frozen=True, slots=True)
class Take(Kernel):
    """The tokens at index ranges `rows`: a view when there is one range, else a copy."""

    rows: Ranges

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0].with_size(1, sum(b - a for a, b in self.rows)),)

    @property
    def aliases(self) -> dict[int, int]:
        return {0: 0} if len(self.rows) == 1 else {}

    def work(self, *inputs: TensorSpec) -> Work:
        nbytes = 0 if self.aliases else self.outputs(*inputs)[0].nbytes
        return Work(0, nbytes, nbytes)

    def run(self, *inputs):
        import torch

        parts = [inputs[0][:, a:b] for a, b in self.rows]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1),)

    def label(self) -> str:
        return (
            "take " + ",".join(f"{a}:{b}" for a, b in self.rows[:3]) + ("..." if len(self.rows) > 3 else "")
        )


@register("take_heads")
@dataclass(frozen=True, slots=True)
class TakeHeads(ViewKernel):
    """Heads `start` to `stop`, a view."""

    start: int
    stop: int

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0].with_size(2, self.stop - self.start),)

    def run(self, *inputs):
        return (inputs[0][:, :, self.start : self.stop],)

    def label(self) -> str:
        return f"heads {self.start}:{self.stop}"


@register("spread")
@dataclass(frozen=True, slots=True)
class Spread(Kernel):
    """A tensor of `count` tokens that holds the input at index ranges `rows` and `fill` elsewhere."""

    rows: Ranges
    count: int
    fill: float = 0.0

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0].with_size(1, self.count),)

    def run(self, *inputs):
        part = inputs[0]
        whole = part.new_full((part.shape[0], self.count, *part.shape[2:]), self.fill)
        done = 0
        for a, b in self.rows:
            whole[:, a:b] = part[:, done : done + b - a]
            done += b - a
        return (whole,)


@register("assemble")
@dataclass(frozen=True, slots=True)
class Assemble(Kernel):
    """Several tensors laid into one along tokens: `places[p]` says where the tokens of input p go."""

    places: tuple[tuple[Place, ...], ...]

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        count = sum(n for part in self.places for _, n, _, _ in part)
        return (inputs[0].with_size(1, count),)

    def run(self, *inputs):
        first = inputs[0]
        count = sum(n for part in self.places for _, n, _, _ in part)
        whole = first.new_empty((first.shape[0], count, *first.shape[2:]))
        for x, part in zip(inputs, self.places, strict=True):
            for a, n, b, stride in part:
                whole[:, b : b + (n - 1) * stride + 1 : stride] = x[:, a : a + n]
        return (whole,)


@register("pick")
@dataclass(frozen=True, slots=True)
class Pick(Kernel):
    """The tokens of one part out of an assembled tensor: the inverse of `Assemble` for one input."""

    places: tuple[Place, ...]

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0].with_size(1, sum(n for _, n, _, _ in self.places)),)

    def work(self, *inputs: TensorSpec) -> Work:
        nbytes = self.outputs(*inputs)[0].nbytes
        return Work(0, nbytes, nbytes)

    def run(self, *inputs):
        whole = inputs[0]
        count = sum(n for _, n, _, _ in self.places)
        part = whole.new_empty((whole.shape[0], count, *whole.shape[2:]))
        for a, n, b, stride in self.places:
            part[:, a : a + n] = whole[:, b : b + (n - 1) * stride + 1 : stride]
        return (part,)


@register("join_heads")
@dataclass(frozen=True, slots=True)
class JoinHeads(Kernel):
    """Tensors of the same tokens joined along heads."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0].with_size(2, sum(x.shape[2] for x in inputs)),)

    def run(self, *inputs):
        import torch

        return (torch.cat(inputs, 2),)


@register("add_heads")
@dataclass(frozen=True, slots=True)
class AddHeads(Kernel):
    """Tensors of the same tokens, input p holding heads `starts[p]` on, summed into `heads` heads in input order."""

    starts: tuple[int, ...]
    heads: int

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0].with_size(2, self.heads),)

    def run(self, *inputs):
        first = inputs[0]
        total = first.new_zeros((*first.shape[:2], self.heads, *first.shape[3:]))
        for start, x in zip(self.starts, inputs, strict=True):
            total[:, :, start : start + x.shape[2]] += x
        return (total,)


@register("cast")
@dataclass(frozen=True, slots=True)
class Cast(Kernel):
    """The same values in another dtype."""

    dtype: str

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0].cast(self.dtype),)

    def run(self, *inputs):
        return (inputs[0].to(torch_dtype(self.dtype)),)

    def label(self) -> str:
        return f"cast {self.dtype}"


@register("fill")
@dataclass(frozen=True, slots=True)
class Fill(Kernel):
    """A new tensor of one value."""

    spec: TensorSpec
    value: float = 0.0
    device: str = "cpu"

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (self.spec,)

    def run(self, *inputs):
        import torch

        return (
            torch.full(self.spec.shape, self.value, dtype=torch_dtype(self.spec.dtype), device=self.device),
        )


@register("repeat_heads")
@dataclass(frozen=True, slots=True)
class RepeatHeads(Kernel):
    """Every head `times` times, one after the other."""

    times: int

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0].with_size(2, inputs[0].shape[2] * self.times),)

    def run(self, *inputs):
        return (inputs[0].repeat_interleave(self.times, 2),)


@register("fold_heads")
@dataclass(frozen=True, slots=True)
class FoldHeads(Kernel):
    """The sum of every `times` neighbouring heads: the gradient of `RepeatHeads`."""

    times: int

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0].with_size(2, inputs[0].shape[2] // self.times),)

    def run(self, *inputs):
        return (inputs[0].unflatten(2, (-1, self.times)).sum(3),)
