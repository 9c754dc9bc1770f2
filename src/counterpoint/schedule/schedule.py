"""The schedule: for each rank, ordered steps on streams over typed, named values.

A schedule is data. The runtime executes it with torch, the simulator with a virtual clock; both follow the same
rules:

- Steps on one stream run one after the other. A step also waits until the values it reads exist. Nothing else
  orders steps, so streams overlap.
- A message goes from a `Send` to the `Recv` that matches it: the n-th message from rank a to rank b on a channel
  meets the n-th receive of b from a on that channel. Both wait for each other (rendezvous). Sends of a channel form
  the stream "<channel>.send" and receives "<channel>.recv", so a channel is full duplex.
- Receives are posted ahead, in order, as long as fewer than `depth` messages of the channel are posted or alive;
  depth 2 is double buffering.
- A value lives from its definition (a receive: from its posting) until the last step that reads it, or something
  that shares its memory, has finished. Outputs live on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from counterpoint.kernels.kernel import Kernel, TensorSpec

DEPTH = 2  # messages of a channel that a rank holds or has posted, unless the schedule says otherwise


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor with a name that is unique on its rank."""

    name: str
    spec: TensorSpec

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes


@dataclass(frozen=True, slots=True)
class Compute:
    """Run a kernel on values of this rank."""

    kernel: Kernel
    inputs: tuple[str, ...]
    outputs: tuple[Value, ...]
    stream: str = "compute"

    @property
    def reads(self) -> tuple[str, ...]:
        return self.inputs

    @property
    def writes(self) -> tuple[Value, ...]:
        return self.outputs

    def label(self) -> str:
        return self.kernel.label()


@dataclass(frozen=True, slots=True)
class Send:
    """Send values, as one message, to rank `to`."""

    inputs: tuple[str, ...]
    to: int
    channel: str

    @property
    def stream(self) -> str:
        return f"{self.channel}.send"

    @property
    def reads(self) -> tuple[str, ...]:
        return self.inputs

    @property
    def writes(self) -> tuple[Value, ...]:
        return ()

    def label(self) -> str:
        return f"send to {self.to}"


@dataclass(frozen=True, slots=True)
class Recv:
    """Receive values, as one message, from rank `source`."""

    outputs: tuple[Value, ...]
    source: int
    channel: str

    @property
    def stream(self) -> str:
        return f"{self.channel}.recv"

    @property
    def reads(self) -> tuple[str, ...]:
        return ()

    @property
    def writes(self) -> tuple[Value, ...]:
        return self.outputs

    def label(self) -> str:
        return f"recv from {self.source}"


@dataclass(frozen=True, slots=True)
class Collective:
    """Exchange messages with several ranks at once; `kind` names the pattern ("all_gather", "all_to_all", ...).

    Each pair exchanges its message directly. What a rank keeps for itself is not part of the step, nor is the sum of
    a reduction, which is a `Compute` in rank order. Lengths may differ from rank to rank.
    """

    kind: str
    sends: tuple[tuple[int, tuple[str, ...]], ...]
    recvs: tuple[tuple[int, tuple[Value, ...]], ...]
    channel: str

    @property
    def stream(self) -> str:
        return self.channel

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, names in self.sends for name in names))

    @property
    def writes(self) -> tuple[Value, ...]:
        return tuple(value for _, values in self.recvs for value in values)

    def label(self) -> str:
        peers = sorted({p for p, _ in self.sends} | {p for p, _ in self.recvs})
        return f"{self.kind} with {','.join(map(str, peers))}"


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy a value to another memory tier of this rank ("device", "host")."""

    input: str
    output: Value
    tier: str
    stream: str = "copy"

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.input,)

    @property
    def writes(self) -> tuple[Value, ...]:
        return (self.output,)

    def label(self) -> str:
        return f"copy to {self.tier}"


Step = Compute | Send | Recv | Collective | Copy


@dataclass(frozen=True)
class Schedule:
    """What one rank does: the values it is given, its steps, the values it hands back.

    donated: inputs that the schedule may write into (parameters that an optimizer updates); no other is changed.
    phases: per step, the part of a larger whole that it belongs to ("mlp", "attention forward"); empty: nobody said.
    """

    name: str
    rank: int
    world_size: int
    inputs: tuple[Value, ...]
    outputs: dict[str, str]  # what the caller calls a result -> the value's name
    steps: tuple[Step, ...]
    depths: dict[str, int] = field(default_factory=dict)
    donated: tuple[str, ...] = ()
    phases: tuple[str, ...] = ()

    def phase(self, index: int) -> str:
        """The phase of a step, "" when nobody said."""
        return self.phases[index] if self.phases else ""

    def depth(self, channel: str) -> int:
        return self.depths.get(channel, DEPTH)

    @cached_property
    def values(self) -> dict[str, Value]:
        """Every value by name."""
        return {v.name: v for v in (*self.inputs, *(w for step in self.steps for w in step.writes))}

    @cached_property
    def streams(self) -> dict[str, tuple[int, ...]]:
        """Indices of the steps of each stream, in order."""
        order: dict[str, list[int]] = {}
        for i, step in enumerate(self.steps):
            order.setdefault(step.stream, []).append(i)
        return {stream: tuple(indices) for stream, indices in order.items()}

    @cached_property
    def memory(self) -> Memory:
        return Memory.of(self)

    def nbytes(self, names: Iterable[str]) -> int:
        return sum(self.values[name].nbytes for name in names)

    def sent_bytes(self) -> dict[int, int]:
        """Payload bytes this rank sends, by destination."""
        total: dict[int, int] = {}
        for step in self.steps:
            if isinstance(step, Send):
                total[step.to] = total.get(step.to, 0) + self.nbytes(step.inputs)
            elif isinstance(step, Collective):
                for to, names in step.sends:
                    total[to] = total.get(to, 0) + self.nbytes(names)
        return {to: n for to, n in sorted(total.items()) if n}

    def __str__(self) -> str:
        from counterpoint.schedule.table import table

        return table(self)


@dataclass(frozen=True, slots=True)
class Memory:
    """Who shares memory with whom, and how many steps read it: what both executors need to free values.

    root: the value whose buffer a value lives in (itself, or for views and accumulators what they alias).
    readers: number of steps that read a root's buffer under any name. kept: roots that inputs and outputs hold.
    """

    root: dict[str, str]
    readers: dict[str, int]
    kept: frozenset[str]

    @classmethod
    def of(cls, schedule: Schedule) -> Memory:
        root = {v.name: v.name for v in schedule.inputs}
        readers: dict[str, int] = dict.fromkeys(root, 0)
        for step in schedule.steps:
            aliases = step.kernel.aliases if isinstance(step, Compute) else {}
            for name in {root[name] for name in step.reads}:
                readers[name] += 1
            for i, value in enumerate(step.writes):
                shared = root[step.reads[aliases[i]]] if i in aliases else value.name
                root[value.name] = shared
                readers.setdefault(shared, 0)
        held = (*(v.name for v in schedule.inputs), *schedule.outputs.values())
        return cls(root, readers, frozenset(root[name] for name in held))
