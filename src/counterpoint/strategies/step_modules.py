"""Parts of a training step as modules of the model: what all that write a step share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from counterpoint.kernels.kernel import TensorSpec
from counterpoint.kernels.module import Module, Operator
from counterpoint.model.work import Part
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.schedule import Schedule, Value

if TYPE_CHECKING:
    from counterpoint.strategies.step import TrainStep

Values = dict[str, Value]


class Modules:
    """Writes modules and schedules of one rank's step; a value is called "layer 3 mlp/x": its part, then its name.

    name: put before all names, while several sequences follow each other.
    """

    def __init__(self, step: TrainStep, rank: int) -> None:
        self.step, self.rank, self.name = step, rank, ""
        self.b = Builder("training step", rank, step.world_size)
        self.place = rank % step.sequence_size  # within the ranks that share a sequence
        self.ranks = range(rank - self.place, rank - self.place + step.sequence_size)

    def module(
        self,
        phase: str,
        operators: tuple[Operator, ...],
        made: tuple[TensorSpec, ...],
        *inputs: Value,
        where: str = "",
        names: Sequence[str] = (),
    ) -> tuple[Value, ...]:
        self.b.phase = phase
        names = [f"{self.name}{where}{phase}/{name}" for name in names or ["x", "saved", *"yz"][: len(made)]]
        return self.b.compute(Module(phase, operators, made), *inputs, names=names)

    def inline(self, phase: str, schedule: Schedule, given: Values, where: str, what: str = "") -> Values:
        """The schedule of the ranks that share a sequence."""
        self.b.phase = phase
        return self.b.inline(schedule, given, f"{self.name}{where}{what or phase}/", self.ranks)

    def gradient(self, part: Part) -> TensorSpec:
        """The gradients of a part, in the dtype of its parameters while they are whole."""
        return TensorSpec((part.parameters,), self.step.dtype)


def opaque(nbytes: int) -> TensorSpec:
    """What a module saves, without saying what it is."""
    return TensorSpec((nbytes,), "uint8")
