"""Operators of a layer with their gradients, as steps of a schedule.

A writer keeps the gradients of what is trained by name; several parts of one gradient are summed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from counterpoint.kernels.kernel import Kernel
from counterpoint.kernels.norm import (
    ExpandRows,
    RMSNorm,
    RMSNormBackward,
    RMSUnit,
    RMSUnitBackward,
    Weigh,
    WeighBackward,
)
from counterpoint.kernels.pointwise import Accumulate, Multiply, Sum
from counterpoint.kernels.projection import Linear, LinearInput, LinearWeight, Lora, LoraBackward
from counterpoint.kernels.shape import Cast, Take
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.schedule import Value
from counterpoint.strategies.memory.cost import Block

Values = dict[str, Value]


class Operators:
    """Writes operators over named weights. rank: of LoRA adapters beside frozen weights; None trains the weights.

    After the gradients have been written, `grads` holds those of what is trained. `saved` dictionaries take the names
    of `cost.saved_tensors`. With `sparse` only the first two and the last two of many equal pieces are written: none
    in between takes more memory than they.
    """

    def __init__(self, builder: Builder, block: Block, weights: Values, rank: int | None) -> None:
        self.builder, self.block, self.config = builder, block, block.config
        self.weights, self.rank = weights, rank
        self.grads: Values = {}
        self.sparse = False
        self._sums: list[Values] = []

    def one(self, kernel: Kernel, *inputs: Value, name: str | None = None) -> Value:
        return self.builder.compute(kernel, *inputs, names=None if name is None else (name,))[0]

    def rows(self, x: Value, a: int, b: int) -> Value:
        return x if (a, b) == (0, x.spec.shape[1]) else self.one(Take(((a, b),)), x)

    def some(self, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return spans[:2] + spans[-2:] if self.sparse and len(spans) > 4 else spans

    def cast(self, x: Value) -> Value:
        return x if x.spec.dtype == self.block.dtype else self.one(Cast(self.block.dtype), x)

    def widened(self, x: Value) -> Value:
        """x in the dtype of norms and statistics."""
        return x if x.spec.dtype == self.block.wide else self.one(Cast(self.block.wide), x)

    def norm(self, x: Value, name: str, weight: str, saved: Values) -> Value:
        w, eps, wide = self.weights[weight], self.config.rms_norm_eps, self.block.wide
        if self.block.norm == "fused":
            y, scale = self.builder.compute(RMSNorm(eps), x, w, names=("h", "scale"))
            saved.update({name: x, f"{name}.scale": scale})
            return y
        if x.spec.dtype == wide:
            saved[name] = x
        else:
            x = saved[f"{name}.wide"] = self.one(Cast(wide), x)
        scale, unit = self.builder.compute(RMSUnit(eps), x, names=("scale", "unit"))
        if self.block.norm == "narrow":
            unit = self.cast(unit)
        saved.update({f"{name}.scale": scale, f"{name}.unit": unit})
        return self.one(Weigh(self.block.dtype), unit, w, name="h")

    def norm_back(self, dy: Value, name: str, weight: str, saved: Values) -> Value:
        w, trained = self.weights[weight], self.rank is None
        if self.block.norm == "fused":
            made = self.builder.compute(
                RMSNormBackward(trained),
                dy,
                saved[name],
                saved[f"{name}.scale"],
                w,
                names=("dx", "dw")[: 1 + trained],
            )
            if trained:
                self.gradient(weight, made[1])
            return made[0]
        inputs = (dy, saved[f"{name}.unit"], w) if trained else (dy, w)
        kernel = WeighBackward(self.block.wide, trained)
        made = self.builder.compute(kernel, *inputs, names=("dunit", "dw")[: 1 + trained])
        if trained:
            self.gradient(weight, made[1])
        x = saved[name] if self.block.dtype == self.block.wide else saved[f"{name}.wide"]
        straight, slope = self.builder.compute(
            RMSUnitBackward(), made[0], x, saved[f"{name}.scale"], names=("dx", "slope")
        )
        slopes, twice = self.one(ExpandRows(), slope, x, name="slopes"), self.one(Sum(), x, x, name="twice")
        return self.cast(self.one(Sum(), straight, self.one(Multiply(), slopes, twice, name="dx")))

    def linear(self, name: str, x: Value, saved: Values) -> Value:
        label = name.removesuffix("_proj")
        if self.rank is not None and f"{name}.a" in self.weights:
            inputs = (self.weights[name], self.weights[f"{name}.a"], self.weights[f"{name}.b"])
            y, saved[f"{name}.u"] = self.builder.compute(Lora(), x, *inputs, names=(label, "u"))
        else:
            bias = [self.weights[f"{name}.bias"]] if f"{name}.bias" in self.weights else []
            y = self.one(Linear(), x, self.weights[name], *bias, name=label)
        return y

    def linear_back(self, name: str, dy: Value, x: Value, saved: Values) -> Value:
        w = self.weights[name]
        if self.rank is not None and f"{name}.a" in self.weights:
            a, b = self.weights[f"{name}.a"], self.weights[f"{name}.b"]
            dx, da, db = self.builder.compute(
                LoraBackward(), dy, x, saved[f"{name}.u"], w, a, b, names=("dx", "da", "db")
            )
            self.gradient(f"{name}.a", da)
            self.gradient(f"{name}.b", db)
            return dx
        dx = self.one(LinearInput(), dy, w, name="dx")
        if self.rank is not None:  # frozen, and without an adapter
            return dx
        bias = f"{name}.bias" in self.weights
        made = self.builder.compute(LinearWeight(bias), dy, x, names=("dw", "db")[: 1 + bias])
        for key, part in zip((name, f"{name}.bias"), made, strict=False):
            self.gradient(key, part)
        return dx

    def gradient(self, name: str, part: Value) -> None:
        if not self._sums:
            self.grads[name] = part
            return
        sums = self._sums[-1]
        part = self.widened(part)
        sums[name] = part if name not in sums else self.one(Accumulate(), sums[name], part)

    @contextmanager
    def pieces(self) -> Iterator[None]:
        """Gradients of the pieces in between add up, in float32, before they become gradients of the weights."""
        self._sums.append({})
        yield
        for name, total in self._sums.pop().items():
            dtype = self.weights[name].spec.dtype
            self.gradient(name, total if total.spec.dtype == dtype else self.one(Cast(dtype), total))
