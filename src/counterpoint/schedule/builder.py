"""Writing a schedule: one call per step, in the order in which a reader should think of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from counterpoint.kernels.kernel import Kernel, TensorSpec
from counterpoint.schedule.schedule import Collective, Compute, Copy, Recv, Schedule, Send, Step, Value


class Builder:
    """Collects the steps of one rank.

    Methods return the values that a step defines; pass them to later steps. A value's name is made unique by a
    suffix when it is used twice. `phase` is noted of every step that is added from then on.
    """

    def __init__(self, name: str, rank: int, world_size: int) -> None:
        self.name, self.rank, self.world_size = name, rank, world_size
        self._inputs: list[Value] = []
        self._donated: list[str] = []
        self.phase = ""
        self._steps: list[Step] = []
        self._phases: list[str] = []
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
        read = tuple([v.name for v in inputs])
        specs = kernel.outputs(*[v.spec for v in inputs])
        if names is None:
            names = read[: len(specs)] if read else ("value",) * len(specs)
        outputs = tuple([self._value(name, spec) for name, spec in zip(names, specs, strict=True)])
        self._add(Compute(kernel, read, outputs, stream))
        return outputs

    def send(self, values: Iterable[Value], to: int, channel: str) -> None:
        """Send values as one message on a channel."""
        self._add(Send(tuple([v.name for v in values]), to, channel))

    def recv(
        self, specs: Sequence[TensorSpec], source: int, channel: str, names: Sequence[str] | None = None
    ) -> tuple[Value, ...]:
        """Receive one message of values with these specs on a channel."""
        names = names or [f"{channel}{i}" for i in range(len(specs))]
        outputs = tuple([self._value(name, spec) for name, spec in zip(names, specs, strict=True)])
        self._add(Recv(outputs, source, channel))
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
            self._add(Collective(kind, out, tuple(outputs.items()), channel))
        return outputs

    def copy(self, value: Value, tier: str, stream: str = "copy") -> Value:
        """Copy a value to another memory tier."""
        output = self._value(value.name, value.spec)
        self._add(Copy(value.name, output, tier, stream))
        return output

    def depth(self, channel: str, messages: int) -> None:
        """How many messages of a channel this rank holds or has posted at most (default 2)."""
        self._depths[channel] = messages

    def finish(self, outputs: Mapping[str, Value]) -> Schedule:
        """The schedule that returns these values by these names, without computations and inputs nothing needs."""
        names = {key: v.name for key, v in outputs.items()}
        needed = set(names.values())
        kept: list[Step] = []
        phases: list[str] = []
        for step, phase in zip(reversed(self._steps), reversed(self._phases), strict=True):
            if isinstance(step, (Compute, Copy)):
                for value in step.writes:
                    if value.name in needed:
                        break
                else:
                    continue
            needed.update(step.reads)
            kept.append(step)
            phases.append(phase)
        inputs = tuple(v for v in self._inputs if v.name in needed)
        donated = tuple(name for name in self._donated if name in needed)
        steps, known = tuple(reversed(kept)), tuple(reversed(phases)) if any(phases) else ()
        return Schedule(
            self.name, self.rank, self.world_size, inputs, names, steps, self._depths, donated, known
        )

    def inline(
        self,
        schedule: Schedule,
        given: Mapping[str, Value],
        prefix: str = "",
        ranks: Sequence[int] | None = None,
    ) -> dict[str, Value]:
        """Write another schedule's steps into this one; returns its outputs by name.

        given: this schedule's values for its inputs, by their names. prefix: put before the names of its values, which
        are then kept; without one they are made unique. Steps keep their order, channels and depths. ranks: which rank
        of this schedule each of its ranks is (default: the same number).

        Raises ValueError: an input that is missing or of another type, a prefix that is taken, ranks that do not fit.
        """
        ranks = range(schedule.world_size) if ranks is None else ranks
        if len(ranks) != schedule.world_size or ranks[schedule.rank] != self.rank:
            raise ValueError(
                f"{schedule.name} is for rank {schedule.rank} of {schedule.world_size}; ranks {list(ranks)} do not "
                f"make that rank {self.rank}"
            )
        values: dict[str, Value] = {}
        for value in schedule.inputs:
            if value.name not in given:
                raise ValueError(
                    f"{schedule.name} needs an input {value.name!r}; given are {', '.join(given)}"
                )
            if given[value.name].spec != value.spec:
                raise ValueError(
                    f"{value.name} is {given[value.name].spec}, but {schedule.name} expects {value.spec}"
                )
            values[value.name] = given[value.name]
        taken = {f"{prefix}{v.name.split(chr(39))[0]}" for s in schedule.steps for v in s.writes}
        if prefix and taken & self._uses.keys():
            raise ValueError(f"values with prefix {prefix!r} are defined already; choose another")

        def made(value: Value) -> Value:
            if not prefix:
                values[value.name] = self._value(value.name, value.spec)
                return values[value.name]
            base, _, count = value.name.partition("'")
            self._uses[prefix + base] = max(self._uses.get(prefix + base, 0), int(count or 0) + 1)
            values[value.name] = Value(prefix + value.name, value.spec)
            return values[value.name]

        def read(names: Iterable[str]) -> tuple[str, ...]:
            return tuple(values[name].name for name in names)

        for step in schedule.steps:
            if isinstance(step, Compute):
                inputs = read(step.inputs)
                step = replace(step, inputs=inputs, outputs=tuple(map(made, step.outputs)))
            elif isinstance(step, Send):
                step = replace(step, inputs=read(step.inputs), to=ranks[step.to])
            elif isinstance(step, Recv):
                step = replace(step, outputs=tuple(map(made, step.outputs)), source=ranks[step.source])
            elif isinstance(step, Collective):
                sends = tuple((ranks[to], read(names)) for to, names in step.sends)
                recvs = tuple((ranks[r], tuple(map(made, outputs))) for r, outputs in step.recvs)
                step = replace(step, sends=sends, recvs=recvs)
            else:
                source = values[step.input].name
                step = replace(step, input=source, output=made(step.output))
            self._add(step)
        for channel in {step.channel for step in schedule.steps if isinstance(step, Send | Recv)}:
            self._depths[channel] = max(self._depths.get(channel, 0), schedule.depth(channel))
        return {key: values[name] for key, name in schedule.outputs.items()}

    def _add(self, step: Step) -> None:
        self._steps.append(step)
        self._phases.append(self.phase)

    def _value(self, name: str, spec: TensorSpec) -> Value:
        name = name.partition("'")[0]
        count = self._uses.get(name, 0)
        self._uses[name] = count + 1
        return Value(f"{name}'{count}" if count else name, spec)
