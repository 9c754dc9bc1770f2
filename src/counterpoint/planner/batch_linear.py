"""What a group of ranks takes for a linear attention layer, and for changing the layout between layers: simulated.

States are as large for a million tokens as for one, so one sequence over all of a group's tokens stands for any. Unlike
a ring's, a state's way is not the same for all ranks: all of a group's schedules are simulated at a few loads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from counterpoint.cluster.cluster import Cluster
from counterpoint.kernels.kernel import TensorSpec
from counterpoint.model.config import ModelConfig
from counterpoint.planner.memory import roomy
from counterpoint.schedule.schedule import Schedule
from counterpoint.simulator.simulate import simulate
from counterpoint.strategies.sequence.halo import halo_schedule
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.strategies.sequence.linear import LinearProblem, parse_linear
from counterpoint.strategies.sequence.linear_builder import LinearShape
from counterpoint.strategies.sequence.relayout import relayout_schedule

PASSES: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")


@dataclass(frozen=True, slots=True)
class Passed:
    """A pass of a group. compute: of its busiest rank (s). waiting: what it took beyond that until the last rank was
    done (s). sent: bytes that a rank sends, mean."""

    compute: float
    waiting: float
    sent: float


def linear_shape(model: ModelConfig, dtype: str, batch: int = 1) -> LinearShape:
    """The shape of a model's linear attention layers, which there must be."""
    m = model.linear
    assert m is not None
    return LinearShape(batch, m.num_heads, m.key_head_dim, m.value_head_dim, m.decay_form, dtype)  # type: ignore[arg-type]


def linear_passes(
    model: ModelConfig, dtype: str, strategy: str, places: Sequence[int], tokens: int, cluster: Cluster
) -> tuple[Passed, Passed]:
    """(forward, backward) of a linear attention layer with `tokens` tokens a rank, its short convolution's halo too."""
    choice, size = parse_linear(strategy), len(places)
    layout = SequenceLayout("contiguous", tokens * size, size)
    problem = LinearProblem(linear_shape(model, dtype), layout, choice, choice)
    assert model.linear is not None
    width, channels = model.linear.conv_kernel_dim, TensorSpec((1, 0, model.linear.channels), dtype)
    found = []
    for which in PASSES:
        passed = _passed(lambda rank, w=which: problem.schedule(w, rank), places, cluster)
        if size > 1 and width > 1:
            halo = _passed(
                lambda rank, w=which: halo_schedule(channels, layout, width, rank, w), places, cluster
            )
            waiting = passed.waiting + halo.compute + halo.waiting
            passed = Passed(passed.compute, waiting, passed.sent + halo.sent)
        found.append(passed)
    return found[0], found[1]


def move_passes(
    hidden: TensorSpec, layout: str, places: Sequence[int], tokens: int, cluster: Cluster
) -> tuple[Passed, Passed]:
    """Hidden states from tokens in order to `layout`, and the other way; with `tokens` tokens a rank."""
    size = len(places)
    ordered, other = (SequenceLayout(kind, tokens * size, size) for kind in ("contiguous", layout))
    found = [
        _passed(lambda rank, w=way: relayout_schedule(hidden, *w, rank), places, cluster)
        for way in ((ordered, other), (other, ordered))
    ]
    return found[0], found[1]


def _passed(schedule: Callable[[int], Schedule], places: Sequence[int], cluster: Cluster) -> Passed:
    schedules = [schedule(rank) for rank in range(len(places))]  # what fits is `BatchCost`'s to say
    line = simulate(schedules, roomy(cluster), placement=list(places))
    compute = max(line.categories(rank)["compute"] for rank in line.ranks)
    return Passed(compute, line.seconds - compute, sum(line.bytes_by_link().values()) / len(places))
