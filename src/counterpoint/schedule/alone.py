"""What a rank computes of a schedule, without its messages."""

from __future__ import annotations

from dataclasses import replace

from counterpoint.schedule.schedule import Compute, Copy, Schedule


def without_messages(schedule: Schedule) -> Schedule:
    """The same computation with everything that would be received given as inputs, and nothing sent."""
    kept = tuple(step for step in schedule.steps if isinstance(step, Compute | Copy))
    phases = tuple(schedule.phase(i) for i, s in enumerate(schedule.steps) if isinstance(s, Compute | Copy))
    received = tuple(v for s in schedule.steps if not isinstance(s, Compute | Copy) for v in s.writes)
    return replace(
        schedule,
        inputs=(*schedule.inputs, *received),
        steps=kept,
        donated=(*schedule.donated, *(v.name for v in received)),
        phases=phases if schedule.phases else (),
    )
