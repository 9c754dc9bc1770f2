"""RMSNorm, in one kernel or by single operators, and rotary embedding.

Shapes: x (B, S, ..., n) normalised over the last dim, weight (n,), scale (B, S, ...) = 1 / rms.
"""

from __future__ import annotations

from dataclasses import dataclass

from counterpoint.kernels.attention import accumulator
from counterpoint.kernels.kernel import Kernel, TensorSpec, Work, register, torch_dtype


@register("rms_norm")
@dataclass(frozen=True, slots=True)
class RMSNorm(Kernel):
    """(x, weight) -> (y, scale): y = x scale weight, computed in float32."""

    eps: float

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        x = inputs[0]
        return x, TensorSpec(x.shape[:-1], accumulator(x.dtype))

    def run(self, *inputs):
        x, weight = inputs
        wide, scale = _scaled(x, self.eps)
        return (wide * scale[..., None] * weight).to(x.dtype), scale


@register("rms_norm_backward")
@dataclass(frozen=True, slots=True)
class RMSNormBackward(Kernel):
    """(dy, x, scale, weight) -> (dx[, dweight])."""

    trained: bool = True

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[1], inputs[3]) if self.trained else (inputs[1],)

    def run(self, *inputs):
        dy, x, scale, weight = inputs
        wide, scale = x.to(scale.dtype), scale[..., None]
        unit, d = wide * scale, dy.to(scale.dtype)
        du = d * weight
        dx = scale * (du - unit * (du * unit).mean(-1, keepdim=True))
        dw = (d * unit).flatten(0, -2).sum(0).to(weight.dtype)
        return (dx.to(x.dtype), dw) if self.trained else (dx.to(x.dtype),)


@register("rms_unit")
@dataclass(frozen=True, slots=True)
class RMSUnit(Kernel):
    """x in float32 -> (scale, unit): unit = x scale, rows of mean square 1."""

    eps: float

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        x = inputs[0]
        return TensorSpec(x.shape[:-1], x.dtype), x

    def run(self, *inputs):
        wide, scale = _scaled(inputs[0], self.eps)
        return scale, wide * scale[..., None]


@register("rms_unit_backward")
@dataclass(frozen=True, slots=True)
class RMSUnitBackward(Kernel):
    """(dunit, x, scale) -> what reaches x straight through the product, and the slope of every row's mean square / 2.

    dx = straight + slope 2 x.
    """

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return inputs[0], inputs[2]

    def run(self, *inputs):
        dunit, x, scale = inputs
        return dunit * scale[..., None], -0.5 * (dunit * x).mean(-1) * scale**3


@register("expand_rows")
@dataclass(frozen=True, slots=True)
class ExpandRows(Kernel):
    """(a number per row, x) -> the number in every place of its row of x's shape."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[1],)

    def work(self, *inputs: TensorSpec) -> Work:
        return Work(0, inputs[0].nbytes, inputs[1].nbytes)

    def run(self, *inputs):
        rows, x = inputs
        return (rows[..., None].expand_as(x).contiguous(),)


@register("norm_weight")
@dataclass(frozen=True, slots=True)
class Weigh(Kernel):
    """(unit, weight) -> unit weight, in `dtype`."""

    dtype: str

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0].cast(self.dtype),)

    def run(self, *inputs):
        unit, weight = inputs
        return ((unit * weight).to(torch_dtype(self.dtype)),)


@register("norm_weight_backward")
@dataclass(frozen=True, slots=True)
class WeighBackward(Kernel):
    """(dy, unit, weight) -> (dunit, dweight); of a frozen weight (dy, weight) -> dunit in the dtype `wide`."""

    wide: str
    trained: bool = True

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        dunit = inputs[0].cast(self.wide)
        return (dunit, inputs[2]) if self.trained else (dunit,)

    def run(self, *inputs):
        dy, weight = inputs[0].to(torch_dtype(self.wide)), inputs[-1]
        if not self.trained:
            return (dy * weight,)
        return dy * weight, (dy * inputs[1]).flatten(0, -2).sum(0).to(weight.dtype)


@register("rotate")
@dataclass(frozen=True, slots=True)
class Rotate(Kernel):
    """(x, cos, sin) -> x turned by rotary angles (B or 1, S, 1, D), or turned back: the gradient (arXiv 2104.09864)."""

    back: bool = False

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0],)

    def work(self, *inputs: TensorSpec) -> Work:
        x, cos, sin = inputs
        return Work(0, x.nbytes + cos.nbytes + sin.nbytes, x.nbytes)

    def run(self, *inputs):
        import torch

        x, cos, sin = inputs
        if self.back:  # the transpose of x -> x cos + (-second, first) sin
            x_sin = x * sin
            first, second = x_sin.chunk(2, -1)
            return (x * cos + torch.cat((second, -first), -1),)
        first, second = x.chunk(2, -1)
        return (x * cos + torch.cat((-second, first), -1) * sin,)


def _scaled(x, eps: float):
    wide = x.to(torch_dtype(accumulator(str(x.dtype).removeprefix("torch."))))
    return wide, (wide.square().mean(-1) + eps).rsqrt()
