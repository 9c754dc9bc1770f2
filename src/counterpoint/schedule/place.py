"""Putting the schedule of a group of ranks on any ranks of a larger world.

Schedules number the ranks of a group 0 to n-1. Placed, they name ranks of the world, so groups of any ranks share one
transport, one Timeline and one simulation. Messages of two groups cannot mix: two ranks talk only in groups that hold
both, both go through these in the same order, and a schedule has ended on a rank when all its messages have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from counterpoint.schedule.schedule import Collective, Recv, Schedule, Send, Step


def placed(schedule: Schedule, ranks: Sequence[int], world_size: int) -> Schedule:
    """The same schedule with rank i of its group being rank `ranks[i]` of a world.

    Raises ValueError unless there are as many different ranks of the world as the schedule has ranks.
    """
    check_ranks(ranks, world_size)
    if len(ranks) != schedule.world_size:
        raise ValueError(
            f"{schedule.name} is for {schedule.world_size} ranks, {len(ranks)} were given: {list(ranks)}"
        )
    if tuple(ranks) == tuple(range(world_size)):
        return schedule
    steps = tuple(_placed(step, ranks) for step in schedule.steps)
    return replace(schedule, rank=ranks[schedule.rank], world_size=world_size, steps=steps)


def check_ranks(ranks: Sequence[int], world_size: int) -> None:
    """Raise ValueError unless `ranks` are different ranks of a world of this size, at least one."""
    if not ranks or len(set(ranks)) != len(ranks) or any(not 0 <= rank < world_size for rank in ranks):
        raise ValueError(
            f"ranks {list(ranks)} are no group: give different ranks from 0 to {world_size - 1}, at least one"
        )


def _placed(step: Step, ranks: Sequence[int]) -> Step:
    if isinstance(step, Send):
        return replace(step, to=ranks[step.to])
    if isinstance(step, Recv):
        return replace(step, source=ranks[step.source])
    if isinstance(step, Collective):
        return replace(
            step,
            sends=tuple((ranks[to], names) for to, names in step.sends),
            recvs=tuple((ranks[source], values) for source, values in step.recvs),
        )
    return step
