"""Schedules as JSON, there and back."""

from __future__ import annotations

from dataclasses import fields
from math import isinf
from typing import Any

from pydantic import TypeAdapter, ValidationError

from counterpoint.kernels import (  # noqa: F401 - their kernels are known by name once imported
    attention,
    flat,
    linear,
    loss,
    module,
    norm,
    pointwise,
    projection,
    rows,
    shape,
)
from counterpoint.kernels.kernel import kernel_class, kernel_name
from counterpoint.schedule.schedule import Collective, Compute, Copy, Recv, Schedule, Send, Step, Value

_KINDS: dict[str, Any] = {
    "compute": Compute,
    "send": Send,
    "recv": Recv,
    "collective": Collective,
    "copy": Copy,
}


def to_json(schedule: Schedule) -> dict[str, Any]:
    """A schedule as plain JSON values."""
    return {
        "name": schedule.name,
        "rank": schedule.rank,
        "world_size": schedule.world_size,
        "inputs": [TypeAdapter(Value).dump_python(v, mode="json") for v in schedule.inputs],
        "outputs": dict(schedule.outputs),
        "steps": [_step_to_json(step) for step in schedule.steps],
        "depths": dict(schedule.depths),
        "donated": list(schedule.donated),
        "phases": list(schedule.phases),
    }


def from_json(data: dict[str, Any]) -> Schedule:
    """The schedule that `to_json` wrote. Raises ValueError that names the first step that cannot be read."""
    try:
        try:
            inputs = tuple(TypeAdapter(Value).validate_python(v) for v in data["inputs"])
        except ValidationError as error:
            raise ValueError(
                f"an input of the stored schedule cannot be read: {error.errors()[0]['msg']}"
            ) from None
        steps = []
        for i, step in enumerate(data["steps"]):
            try:
                steps.append(_step_from_json(step))
            except (KeyError, TypeError, ValueError) as error:
                reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
                raise ValueError(f"step {i} of the stored schedule cannot be read: {reason}") from None
        outputs, depths = dict(data["outputs"]), dict(data["depths"])
        rank, size, donated = data["rank"], data["world_size"], tuple(data.get("donated", ()))
        phases = tuple(data.get("phases", ()))
        if phases and len(phases) != len(steps):
            raise ValueError(
                f"the stored schedule has {len(steps)} steps and phases for {len(phases)} of them"
            )
        return Schedule(data["name"], rank, size, inputs, outputs, tuple(steps), depths, donated, phases)
    except KeyError as error:
        raise ValueError(f"the stored schedule has no entry {error}") from None


def _step_to_json(step: Step) -> dict[str, Any]:
    kind = next(name for name, cls in _KINDS.items() if isinstance(step, cls))
    if not isinstance(step, Compute):
        return {"step": kind, **TypeAdapter(type(step)).dump_python(step, mode="json")}
    kernel = TypeAdapter(type(step.kernel)).dump_python(step.kernel, mode="json")
    # JSON has no infinity; as a string it reads back
    kernel = {key: str(x) if isinstance(x, float) and isinf(x) else x for key, x in kernel.items()}
    return {
        "step": kind,
        "kernel": {"name": kernel_name(type(step.kernel)), **kernel},
        "inputs": list(step.inputs),
        "outputs": [TypeAdapter(Value).dump_python(v, mode="json") for v in step.outputs],
        "stream": step.stream,
    }


def _step_from_json(data: dict[str, Any]) -> Step:
    cls = _KINDS.get(data["step"])
    if cls is None:
        raise ValueError(f"step {data['step']!r} is unknown; known are {', '.join(_KINDS)}")
    rest = {key: value for key, value in data.items() if key != "step"}
    if cls is not Compute:
        return TypeAdapter(cls).validate_python({f.name: rest[f.name] for f in fields(cls)})
    kernel = dict(rest["kernel"])
    made = TypeAdapter(kernel_class(kernel.pop("name"))).validate_python(kernel)
    outputs = tuple(TypeAdapter(Value).validate_python(v) for v in rest["outputs"])
    return Compute(made, tuple(rest["inputs"]), outputs, rest["stream"])
