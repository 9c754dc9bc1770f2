"""What the training step of one configuration is made of, measured on this machine: kernels, modules, messages.

The kernels of attention are timed in the order of their schedules, the modules of the model by a step of the trainer
with attention left out, messages as `calibrate` does, all ranks at work at once. From these parts the simulator
predicts the step, on this machine, before it runs.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from counterpoint.calibration.calibrate import run_workers
from counterpoint.calibration.describe import core_device, process_level
from counterpoint.calibration.measurement import Machine, Series, machine_from, series_from
from counterpoint.calibration.timing import Effort
from counterpoint.cluster.cluster import Cluster
from counterpoint.cluster.device import Device
from counterpoint.files import cache_directory, write_whole
from counterpoint.kernels.kernel import Kernel, TensorSpec
from counterpoint.kernels.module import Module
from counterpoint.simulator.cost import Cost, Costs, KernelCosts
from counterpoint.strategies.step import TrainStep

FORMAT = 2  # raised when what is measured, or how, changes


@dataclass(frozen=True, slots=True)
class StepCalibration:
    """Times of everything a step is made of; `series` are named kernel/..., module/..., core/... and link/...

    What is named processor/... is the processor's time, the rest that of the wall with all ranks at work.
    undisturbed: share of the time in which the workers had the cores that are theirs; below 1, other programs ran.
    """

    machine: Machine
    date: str
    ranks: int
    undisturbed: float
    series: Mapping[str, Series]

    @property
    def slowdown(self) -> float:
        """How much longer everything takes because ranks take turns on cores."""
        return max(1.0, self.ranks / self.machine.cores)

    def points(self, prefix: str) -> dict[str, Series]:
        """The series whose names start with a prefix, by the rest of the name."""
        return {name[len(prefix) :]: s for name, s in self.series.items() if name.startswith(prefix)}

    def cluster(self) -> Cluster:
        """This machine as a cluster of as many ranks as were measured."""
        memory, links = self.machine.memory_bytes // self.ranks, self.points("link/")
        device = core_device(memory, self.points("core/"), self.slowdown)
        levels = (process_level(self.ranks, links),) if self.ranks > 1 else ()
        about = f"{self.ranks} processes on {self.machine.processor}, {self.machine.cores} cores; {self.date}"
        return Cluster(
            "this-machine", {"core": device}, (("core", self.ranks),), levels, self.ranks, about=about
        )

    def costs(self) -> Costs:
        """Measured times of kernels and modules; what was not measured follows the device's curves."""
        times = {
            key: s.points[0].typical * (self.slowdown if prefix == "processor/" else 1.0)
            for prefix in ("kernel/", "module/", "processor/")
            for key, s in self.points(prefix).items()
        }

        def of(device: Device) -> Cost:
            described = KernelCosts(device)

            def cost(kernel: Kernel, inputs: Sequence[TensorSpec]) -> tuple[float, int]:
                key = kernel.title if isinstance(kernel, Module) else kernel_key(kernel, inputs)
                seconds = times.get(key)
                return described(kernel, inputs) if seconds is None else (seconds, kernel.work(*inputs).flops)

            return cost

        return of

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> StepCalibration:
        """Raises ValueError, KeyError or TypeError when the text is not what `to_json` wrote."""
        data = json.loads(text)
        return cls(machine=machine_from(data.pop("machine")), series=series_from(data.pop("series")), **data)


def kernel_key(kernel: Kernel, inputs: Sequence[TensorSpec]) -> str:
    """What tells one measured kernel from another."""
    return f"{kernel!r} of {', '.join(map(str, inputs))}"


def calibrate_step(
    step: TrainStep, machine: Machine, environ: Mapping[str, str], *, refresh: bool = False
) -> StepCalibration:
    """Measure the parts of a step with as many workers as it has ranks, or read what was kept of the last time.

    Raises:
        WorkerFailure: a worker ended badly.
    """
    plain = step_to_json(step)
    key = json.dumps([FORMAT, asdict(machine), plain], sort_keys=True)
    path = cache_directory(environ) / f"step-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    kept = None if refresh else load_step(path)
    if kept is not None:
        return kept
    found = run_workers(step.world_size, {"effort": asdict(Effort.of(True)), "step": plain}, environ)
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    series = series_from(found["series"])
    made = StepCalibration(machine, date, step.world_size, found["undisturbed"], series)
    keep(path, made.to_json())
    return made


def load_step(path: Path) -> StepCalibration | None:
    """The calibration kept in this file; None when there is none that can be read."""
    try:
        return StepCalibration.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep(path: Path, text: str) -> None:
    """Into the cache, if it can be written; a calibration that cannot be kept is still one."""
    try:
        os.makedirs(path.parent, exist_ok=True)
        write_whole(path, text)
    except OSError:
        pass


def step_to_json(step: TrainStep) -> dict[str, Any]:
    """A step as plain JSON values."""
    return TypeAdapter(TrainStep).dump_python(step, mode="json")


def step_from_json(data: Mapping[str, Any]) -> TrainStep:
    """The step that `step_to_json` wrote."""
    return TypeAdapter(TrainStep).validate_python(data)
