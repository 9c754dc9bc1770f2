"""Writing a schedule: one call per step, in the order in which a reader should think of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from counterpoint.kernels.kernel import Kernel, TensorSpec
from counterpoint.schedule.schedule import Collective, Compute, Copy, Recv, Schedule, Send, Step, Value


class Builder:
    """Collects the steps of one rank.

    Methods return the values that a step defines; pass them to later steps. A value's name is made unique by a
    suffix when it is used twice.
    """

    def __init__(self, name: str, rank: int, world_size: int) -> None:
        self.name, self.rank, self.world_size = name, rank, world_size
        self._inputs: list[Value] = []
        self._donated: list[str] = []
        self._steps: list[Step] = []
        self._depths: dict[str, int] = {}
        self._uses: dict[str, int] = {}

    def input(self, name: str, spec: TensorSpec, donated: bool = False) -> Value:
        """A value that the caller hands in; it is written to only if it is donated."""
        value = self._value(name, spec)
        self._inputs.append(value)
        if donated:
            self._donated.append(value.name)
        return value

    def compute(
        self, kernel: Kernel, *inputs: Value, names: Sequence[str] | None = None, stream: str = "compute"
    ) -> tuple[Value, ...]:
        """Run a kernel. names: of the results, by default those the kernel's label suggests."""
        specs = kernel.outputs(*[v.spec for v in inputs])
        if names is None:
            names = [inputs[i].name if inputs else "value" for i in range(len(specs))]
        outputs = tuple([self._value(name, spec) for name, spec in zip(names, specs, strict=True)])
        self._steps.append(Compute(kernel, tuple([v.name for v in inputs]), outputs, stream))
        return outputs

    def send(self, values: Iterable[Value], to: int, channel: str) -> None:
        """Send values as one message on a channel."""
        self._steps.append(Send(tuple(v.name for v in values), to, channel))

    def recv(
        self, specs: Sequence[TensorSpec], source: int, channel: str, names: Sequence[str] | None = None
    ) -> tuple[Value, ...]:
        """Receive one message of values with these specs on a channel."""
        names = names or [f"{channel}{i}" for i in range(len(specs))]
        outputs = tuple([self._value(name, spec) for name, spec in zip(names, specs, strict=True)])
        self._steps.append(Recv(outputs, source, channel))
        return outputs

    def collective(
        self,
        kind: str,
        channel: str,
        sends: Mapping[int, Sequence[Value]],
        recvs: Mapping[int, Sequence[tuple[str, TensorSpec]]],
    ) -> dict[int, tuple[Value, ...]]:
        """Exchange a message with each of several ranks; returns the received values by rank."""
        outputs = {
            rank: tuple(self._value(*item) for item in items) for rank, items in recvs.items() if items
        }
        out = tuple((rank, tuple(v.name for v in values)) for rank, values in sends.items() if values)
        if out or outputs:
            self._steps.append(Collective(kind, out, tuple(outputs.items()), channel))
        return outputs

    def copy(self, value: Value, tier: str, stream: str = "copy") -> Value:
        """Copy a value to another memory tier."""
        output = self._value(value.name, value.spec)
        self._steps.append(Copy(value.name, output, tier, stream))
        return output

    def inline(self, schedule: Schedule, given: Mapping[str, Value]) -> dict[str, Value]:
        """All steps of another schedule of this rank, on given values for its inputs; returns its outputs by name."""
        values = {v.name: given[v.name] for v in schedule.inputs}
        for step in schedule.steps:
            reads = {name: values[name].name for name in step.reads}
            for value in step.writes:
                values[value.name] = self._value(value.name, value.spec)
            self._steps.append(_renamed(step, reads, values))
        for channel in {step.channel for step in schedule.steps if isinstance(step, Send | Recv)}:
            self._depths[channel] = max(self._depths.get(channel, 0), schedule.depth(channel))
        return {key: values[name] for key, name in schedule.outputs.items()}

    def depth(self, channel: str, messages: int) -> None:
        """How many messages of a channel this rank holds or has posted at most (default 2)."""
        self._depths[channel] = messages

    def finish(self, outputs: Mapping[str, Value]) -> Schedule:
        """The schedule that returns these values by these names, without computations and inputs nothing needs."""
        names = {key: v.name for key, v in outputs.items()}
        needed = set(names.values())
        kept: list[Step] = []
        for step in reversed(self._steps):
            if isinstance(step, (Compute, Copy)) and needed.isdisjoint([w.name for w in step.writes]):
                continue
            needed.update(step.reads)
            kept.append(step)
        inputs = tuple(v for v in self._inputs if v.name in needed)
        donated = tuple(name for name in self._donated if name in needed)
        return Schedule(
            self.name, self.rank, self.world_size, inputs, names, tuple(reversed(kept)), self._depths, donated
        )

    def _value(self, name: str, spec: TensorSpec) -> Value:
        if "'" in name:
            name = name[: name.index("'")]
        count = self._uses.get(name, 0)
        self._uses[name] = count + 1
        return Value(f"{name}'{count}" if count else name, spec)


def _renamed(step: Step, reads: Mapping[str, str], values: Mapping[str, Value]) -> Step:
    """The step with other names for what it reads, and other values for what it writes."""

    def written(old: Iterable[Value]) -> tuple[Value, ...]:
        return tuple(values[v.name] for v in old)

    if isinstance(step, Compute):
        inputs = tuple(reads[name] for name in step.inputs)
        return replace(step, inputs=inputs, outputs=written(step.outputs))
    if isinstance(step, Send):
        return replace(step, inputs=tuple(reads[name] for name in step.inputs))
    if isinstance(step, Recv):
        return replace(step, outputs=written(step.outputs))
    if isinstance(step, Copy):
        return replace(step, input=reads[step.input], output=values[step.output.name])
    return replace(
        step,
        sends=tuple((to, tuple(reads[name] for name in names)) for to, names in step.sends),
        recvs=tuple((source, written(made)) for source, made in step.recvs),
    )
