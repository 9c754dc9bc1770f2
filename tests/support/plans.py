"""Random valid plans of ragged batches: any group sizes and ranks, idle ranks, uneven numbers of micro-batches."""

from __future__ import annotations

import random

from hypothesis import strategies as st

from counterpoint.planner.batch import BatchPlan, Group, MicroBatch


def random_plan(seed: int, world_size: int, lengths: tuple[int, ...]) -> BatchPlan:
    """A plan that nobody would make: sequences in random groups of random ranks, in random micro-batches.

    Some ranks may be left out of a micro-batch, or of the whole batch.
    """
    rng = random.Random(seed)
    ranks = rng.sample(range(world_size), rng.randint(1, world_size))
    waiting = rng.sample(range(len(lengths)), len(lengths))
    rows = []
    while waiting:
        free, groups = rng.sample(ranks, rng.randint(1, len(ranks))), []
        while free and waiting:
            size = rng.randint(1, len(free))
            members, free = sorted(free[:size]), free[size:]
            count = min(len(waiting), rng.randint(1, 3))
            groups.append(Group(tuple(members), tuple(waiting[:count])))
            waiting = waiting[count:]
        rows.append(MicroBatch(tuple(groups)))
    return BatchPlan(lengths, world_size, tuple(rows), "random")


@st.composite
def plans(draw: st.DrawFn, world_size: int, longest: int = 40, most: int = 8) -> BatchPlan:
    """Random plans of up to `most` sequences with 1 to `longest` tokens."""
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=most))
    return random_plan(draw(st.integers(0, 2**32)), world_size, tuple(lengths))
