"""What a linear attention layer does around its states: short convolution, feature maps, decays.

Shapes: x (B, S, C), padded (B, width - 1 + S, C), weight (C, width); decays (B, S, heads or channels).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from counterpoint.kernels.kernel import Kernel, TensorSpec, ViewKernel, Work, register


@register("join")
@dataclass(frozen=True, slots=True)
class Join(Kernel):
    """(parts) -> one tensor with their last dims side by side."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        first = inputs[0]
        return (TensorSpec((*first.shape[:-1], sum(x.shape[-1] for x in inputs)), first.dtype),)

    def run(self, *inputs):
        import torch

        return (torch.cat(inputs, -1),)


@register("pad_before")
@dataclass(frozen=True, slots=True)
class PadBefore(Kernel):
    """x -> x behind `count` tokens of zeros."""

    count: int

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0].with_size(1, inputs[0].shape[1] + self.count),)

    def run(self, *inputs):
        import torch.nn.functional as F

        return (F.pad(inputs[0], (0, 0, self.count, 0)),)


@register("convolve")
@dataclass(frozen=True, slots=True)
class Convolve(Kernel):
    """(padded, weight) -> y_t = sum over i of weight[:, i] padded_(t + i), one filter per channel."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        padded, weight = inputs
        return (padded.with_size(1, padded.shape[1] - weight.shape[1] + 1),)

    def work(self, *inputs: TensorSpec) -> Work:
        (y,), width = self.outputs(*inputs), inputs[1].shape[1]
        return Work(2 * width * prod(y.shape), 3 * width * y.nbytes, 2 * width * y.nbytes)

    def run(self, *inputs):
        import torch

        padded, weight = inputs
        width = weight.shape[1]
        tokens = padded.shape[1] - width + 1
        y = torch.zeros_like(padded[:, :tokens])
        for i in range(width):
            y += padded[:, i : i + tokens] * weight[:, i]
        return (y,)


@register("convolve_backward")
@dataclass(frozen=True, slots=True)
class ConvolveBackward(Kernel):
    """(dy, padded, weight) -> dx of what was padded[, dweight]."""

    trained: bool = True

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0], inputs[2]) if self.trained else inputs[:1]

    def work(self, *inputs: TensorSpec) -> Work:
        dy, width = inputs[0], inputs[2].shape[1]
        passes = width * (1 + self.trained)
        return Work(2 * passes * prod(dy.shape), 3 * passes * dy.nbytes, 2 * passes * dy.nbytes)

    def run(self, *inputs):
        import torch

        dy, padded, weight = inputs
        width, tokens = weight.shape[1], dy.shape[1]
        dpadded, dweight = torch.zeros_like(padded), torch.empty_like(weight)
        for i in range(width):
            dpadded[:, i : i + tokens] += dy * weight[:, i]
            if self.trained:
                dweight[:, i] = (dy * padded[:, i : i + tokens]).sum((0, 1))
        dx = dpadded[:, width - 1 :].contiguous()
        return (dx, dweight) if self.trained else (dx,)


@register("elu_plus_one")
@dataclass(frozen=True, slots=True)
class EluPlusOne(Kernel):
    """x -> elu(x) + 1, which is positive."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0],)

    def run(self, *inputs):
        import torch.nn.functional as F

        return (F.elu(inputs[0]) + 1,)


@register("elu_backward")
@dataclass(frozen=True, slots=True)
class EluBackward(Kernel):
    """(dy, x) -> dx of `EluPlusOne`."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[1],)

    def run(self, *inputs):
        dy, x = inputs
        return (dy * x.clamp(max=0).exp(),)


@register("scale")
@dataclass(frozen=True, slots=True)
class Scale(Kernel):
    """x -> factor x."""

    factor: float

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0],)

    def run(self, *inputs):
        return (inputs[0] * self.factor,)


@register("log_sigmoid")
@dataclass(frozen=True, slots=True)
class LogSigmoid(Kernel):
    """x -> log sigmoid(x)[, exp(-|x|), which torch keeps for the backward pass on CPU]."""

    buffer: bool = False

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0],) * (1 + self.buffer)

    def run(self, *inputs):
        import torch.nn.functional as F

        (x,) = inputs
        return (F.logsigmoid(x), (-x.abs()).exp())[: 1 + self.buffer]


@register("log_sigmoid_backward")
@dataclass(frozen=True, slots=True)
class LogSigmoidBackward(Kernel):
    """(dy, x[, the buffer]) -> dx."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[1],)

    def run(self, *inputs):
        dy, x = inputs[:2]
        return (dy * (-x).sigmoid(),)


@register("rates")
@dataclass(frozen=True, slots=True)
class Rates(Kernel):
    """like -> the logarithms of fixed decays in `dtype`, (heads,), on the same device."""

    decays: tuple[float, ...]
    dtype: str
    operator: ClassVar[str] = "elementwise"

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (TensorSpec((len(self.decays),), self.dtype),)

    def work(self, *inputs: TensorSpec) -> Work:
        return Work(len(self.decays), 0, self.outputs(*inputs)[0].nbytes)

    def run(self, *inputs):
        import torch

        from counterpoint.kernels.kernel import torch_dtype

        exact = torch.tensor(self.decays, dtype=torch.float64, device=inputs[0].device).log().float()
        return (exact.to(torch_dtype(self.dtype)),)


@register("expand_heads")
@dataclass(frozen=True, slots=True)
class ExpandHeads(ViewKernel):
    """(heads,) -> (batch, tokens, heads, 1) of the same numbers: a view."""

    batch: int
    tokens: int

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (TensorSpec((self.batch, self.tokens, inputs[0].shape[0], 1), inputs[0].dtype),)

    def run(self, *inputs):
        return (inputs[0][None, None, :, None].expand(self.batch, self.tokens, -1, -1),)
