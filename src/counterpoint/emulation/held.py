"""Compute that takes its time and does nothing: kernels held for the duration that another device would need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter, sleep

from counterpoint.cluster.curves import Curve
from counterpoint.cluster.device import Device, MemoryTier
from counterpoint.kernels.kernel import Kernel, TensorSpec, Work, torch_dtype
from counterpoint.schedule.schedule import Compute, Schedule

NANOSECONDS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Held(Kernel):
    """Stands in for `kernel` for a given time: sleeps, and returns memory of the right shape without computing.

    `work` tells the kernel's own operations, and as bytes its nanoseconds, for a `held_device` that moves one byte
    per nanosecond. So both executors take a held schedule as they take any other.
    """

    kernel: Kernel
    nanoseconds: int

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return self.kernel.outputs(*inputs)

    def work(self, *inputs: TensorSpec) -> Work:
        return Work(self.kernel.work(*inputs).flops, self.nanoseconds, 0)

    def run(self, *inputs):
        import torch

        until = perf_counter() + self.nanoseconds / NANOSECONDS
        specs = [TensorSpec(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in inputs]
        aliases, made = self.aliases, []
        for i, spec in enumerate(self.outputs(*specs)):
            shared = inputs[aliases[i]] if i in aliases else None
            made.append(torch.empty(spec.shape, dtype=torch_dtype(spec.dtype)) if shared is None else shared)
        while (left := until - perf_counter()) > 0:
            sleep(left)
        return tuple(made)

    @property
    def aliases(self) -> dict[int, int]:
        return self.kernel.aliases

    def label(self) -> str:
        return self.kernel.label()


def hold(schedule: Schedule, seconds: Sequence[float]) -> Schedule:
    """The same schedule with every kernel held for its time; seconds: of every step, 0 leaves a kernel as it is."""
    steps = []
    for step, duration in zip(schedule.steps, seconds, strict=True):
        if isinstance(step, Compute) and duration:
            step = replace(step, kernel=Held(step.kernel, round(duration * NANOSECONDS)))
        steps.append(step)
    return replace(schedule, steps=tuple(steps))


def held_device(memory: Sequence[MemoryTier]) -> Device:
    """The device on which a held kernel takes the time it is held."""
    first, *rest = memory
    clock = float(NANOSECONDS)
    tiers = (MemoryTier(first.name, first.size_bytes, clock, Curve.constant(clock)), *rest)
    return Device("held", {}, {}, tiers, 0.0)
