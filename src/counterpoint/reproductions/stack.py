"""A whole training step as one schedule per rank: layers of token mixing, with the rest of each layer between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from counterpoint.kernels.kernel import Kernel, TensorSpec, Work
from counterpoint.schedule.schedule import Collective, Compute, Copy, Recv, Schedule, Send, Step, Value


@dataclass(frozen=True, slots=True)
class Rest(Kernel):
    """What a layer computes beside mixing tokens: costed as matrix products of so many operations, never run."""

    flops: int
    specs: tuple[TensorSpec, ...]
    operator: ClassVar[str] = "matmul"

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return self.specs

    def work(self, *inputs: TensorSpec) -> Work:
        return Work(self.flops, sum(x.nbytes for x in inputs), sum(x.nbytes for x in self.specs))

    def label(self) -> str:
        return "rest of the layer"


def stacked(parts: Sequence[tuple[int, Schedule]], tokens: TensorSpec, last_flops: int) -> Schedule:
    """Passes of one rank in a row: before each `flops` operations make its inputs from what came out before.

    parts: (flops, schedule) in order. tokens: spec of hidden states, the first input. last_flops: behind the last one.
    """
    first = Value("tokens", tokens)
    steps: list[Step] = []
    held: tuple[str, ...] = (first.name,)
    for i, (flops, schedule) in enumerate(parts):
        made = tuple(replace(v, name=f"{i}.{v.name}") for v in schedule.inputs)
        steps.append(Compute(Rest(flops, tuple(v.spec for v in made)), held, made))
        steps += [_renamed(step, f"{i}.") for step in schedule.steps]
        held = tuple(f"{i}.{name}" for name in dict.fromkeys(schedule.outputs.values()))
    end = Value("end", tokens)
    steps.append(Compute(Rest(last_flops, (tokens,)), held, (end,)))
    one = parts[0][1]
    return Schedule("step", one.rank, one.world_size, (first,), {"end": end.name}, tuple(steps), one.depths)


def _renamed(step: Step, prefix: str) -> Step:
    def name(text: str) -> str:
        return prefix + text

    def values(made: Sequence[Value]) -> tuple[Value, ...]:
        return tuple(replace(v, name=name(v.name)) for v in made)

    if isinstance(step, Compute):
        return replace(step, inputs=tuple(map(name, step.inputs)), outputs=values(step.outputs))
    if isinstance(step, Send):
        return replace(step, inputs=tuple(map(name, step.inputs)))
    if isinstance(step, Recv):
        return replace(step, outputs=values(step.outputs))
    if isinstance(step, Collective):
        sends = tuple((to, tuple(map(name, names))) for to, names in step.sends)
        return replace(step, sends=sends, recvs=tuple((source, values(made)) for source, made in step.recvs))
    assert isinstance(step, Copy)
    return replace(step, input=name(step.input), output=values([step.output])[0])
