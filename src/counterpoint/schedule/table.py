"""A schedule as a table that a person can read and diff."""

from __future__ import annotations

from counterpoint.kernels.module import Module
from counterpoint.schedule.schedule import Collective, Compute, Copy, Recv, Schedule, Send, Step


def table(schedule: Schedule) -> str:
    """One line per step: number, stream, what it does, the values it reads and defines, bytes on the wire."""
    rows = [("#", "stream", "step", "reads", "defines", "bytes")]
    for i, step in enumerate(schedule.steps):
        defines = ", ".join(f"{v.name} {v.spec}" for v in step.writes)
        rows.append(
            (str(i), step.stream, step.label(), ", ".join(step.reads), defines, _wire(schedule, step))
        )
    widths = [max(len(row[c]) for row in rows) for c in range(6)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    inputs = ", ".join(f"{v.name} {v.spec}" for v in schedule.inputs)
    head = f"{schedule.name}: rank {schedule.rank} of {schedule.world_size}"
    depths = "".join(f"\ndepth of {channel}: {n}" for channel, n in schedule.depths.items())
    return (
        f"{head}\ngiven: {inputs}{depths}\n"
        + "\n".join(lines)
        + f"\nreturns: {', '.join(f'{key} = {name}' for key, name in schedule.outputs.items())}\n"
    )


def describe(schedule: Schedule, index: int) -> str:
    """A step in a few words, for error messages."""
    step = schedule.steps[index]
    names = (
        ", ".join(v.name for v in step.writes) if isinstance(step, Compute | Recv) else ", ".join(step.reads)
    )
    return f"step {index} ({step.stream}: {step.label()}{': ' + names if names else ''})"


def span_name(step: Step) -> str:
    """What a picture writes on a step. Of a value "layer 3/q" the last part is enough: a phase says the rest."""
    if isinstance(step, Compute):
        # a module has one input and its name says it all
        reads = () if isinstance(step.kernel, Module) else step.reads[:1]
        return " ".join([step.label(), *map(_short, reads)])
    if isinstance(step, Send | Collective | Copy):
        return f"{step.label()}: {', '.join(map(_short, step.reads))}"
    return f"{step.label()}: {', '.join(_short(v.name) for v in step.writes)}"


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _wire(schedule: Schedule, step: Step) -> str:
    if isinstance(step, Send):
        return f"{schedule.nbytes(step.inputs):,} out"
    if isinstance(step, Recv):
        return f"{sum(v.nbytes for v in step.outputs):,} in"
    if isinstance(step, Collective):
        sent = sum(schedule.nbytes(names) for _, names in step.sends)
        return f"{sent:,} out, {sum(v.nbytes for v in step.writes):,} in"
    return ""
