"""The two executors see the same steps, count the same bytes and hold the same values."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch

from counterpoint.cluster.presets import find_cluster
from counterpoint.kernels.kernel import torch_dtype
from counterpoint.schedule.schedule import Schedule
from counterpoint.schedule.timeline import MemoryEvent, Timeline
from counterpoint.simulator.simulate import simulate
from counterpoint.strategies.sequence.attention import (
    AttentionProblem,
    AttentionShape,
    backward_schedule,
    forward_schedule,
    parse_choices,
)
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.strategies.sequence.linear import LinearProblem, parse_linear
from counterpoint.strategies.sequence.linear_builder import DECAYS, Decay, LinearShape
from support.ranks import run_ranks

NAMES = (
    "ring",
    "bidirectional_ring",
    "tokenring",
    "allgather",
    "ulysses",
    "rsa",
    "ring/tokenring",
    "ulysses/ring",
)


def what_happened(timeline: Timeline) -> Counter:
    return Counter(
        (s.rank, s.stream, s.kind, s.name, s.peer, s.nbytes, s.flops, s.links) for s in timeline.spans
    )


def changes(events: list[MemoryEvent]) -> Counter:
    live = [e.live_bytes for e in events]
    return Counter([live[0], *(b - a for a, b in pairwise(live))])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [forward_schedule, backward_schedule])
def test_runtime_and_simulator_agree(name: str, make):
    mesh = (2, 2) if "/" in name else (4,)
    choices = parse_choices(name)
    shape = AttentionShape(1, 8, 4, 16)
    problem = AttentionProblem(shape, SequenceLayout("zigzag", 101, 4), mesh, choices, choices)
    agree([make(problem, rank) for rank in range(4)])


@pytest.mark.parametrize("strategy", ["states", "states_chain", "states_chain(ahead=true)"])
@pytest.mark.parametrize("decay", DECAYS)
def test_they_agree_on_linear_attention(decay: Decay, strategy: str):
    choice, shape = parse_linear(strategy), LinearShape(1, 8, 16, 12, decay)
    for causal in (True, False):
        layout = SequenceLayout("contiguous", 101, 4, (10, 70, 21))
        problem = LinearProblem(shape, layout, choice, choice, causal)
        for which in ("forward", "backward"):
            agree([problem.schedule(which, rank) for rank in range(4)])


def agree(schedules: list[Schedule]) -> None:
    """The same spans, bytes by link and changes of memory in a run and in a simulation."""
    inputs = [
        {v.name: torch.rand(v.spec.shape).to(torch_dtype(v.spec.dtype)) for v in s.inputs} for s in schedules
    ]
    lines = [Timeline() for _ in schedules]
    run_ranks(schedules, inputs, lines)
    measured, simulated = Timeline.merge(lines), simulate(schedules, find_cluster("dgx-h100"))
    assert what_happened(simulated) == what_happened(measured)
    assert simulated.bytes_by_link() == measured.bytes_by_link()
    for rank, line in enumerate(lines):
        ours = [m for m in simulated.memory if m.rank == rank]
        assert changes(ours) == changes(line.memory), "the same buffers come and go; their order may differ"
