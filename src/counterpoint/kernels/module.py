"""Operators that a torch module carries out as a whole: for costing, beside kernels that schedules run themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from counterpoint.kernels.kernel import Kernel, TensorSpec, Work, register


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator of a module: its name, the class of rate that a device quotes for it, its work, its dtype."""

    name: str
    operator: str
    work: Work
    dtype: str = "float32"


@register("module")
@dataclass(frozen=True, slots=True)
class Module(Kernel):
    """Operators one after the other, between values of types that are given; the runtime reaches them as a module.

    The simulator adds up what its operators cost. `made` are the types of the results.
    """

    title: str
    operators: tuple[Operator, ...]
    made: tuple[TensorSpec, ...]

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return self.made

    def work(self, *inputs: TensorSpec) -> Work:
        works = [o.work for o in self.operators]
        return Work(
            sum(w.flops for w in works), sum(w.bytes_read for w in works), sum(w.bytes_written for w in works)
        )

    def run(self, *inputs: Any):
        raise TypeError(f"{self.title} is a module of the model and runs there, not as a step of a schedule")

    def label(self) -> str:
        return self.title
