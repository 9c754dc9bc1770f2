"""Scale: a shorter sequence and slower links keep every proportion."""

import pytest
import torch

from counterpoint.cluster.presets import find_cluster
from counterpoint.emulation.held import Held, hold
from counterpoint.emulation.scale import (
    Scale,
    bytes_by_pair,
    choose_rates,
    pair_rates,
    same_steps,
    scaled_cluster,
    shrunk,
    step_seconds,
)
from counterpoint.kernels.attention import Attend, Merge
from counterpoint.runtime.executor import Executor
from counterpoint.schedule.schedule import Compute
from counterpoint.schedule.timeline import Timeline
from counterpoint.simulator.simulate import simulate
from counterpoint.strategies.sequence.attention import (
    AttentionProblem,
    backward_schedule,
    forward_schedule,
    parse_choices,
)
from counterpoint.strategies.sequence.blocks import AttentionShape
from counterpoint.strategies.sequence.layout import SequenceLayout


def problem_of(strategy="tokenring", tokens=9600, ranks=4, kv_heads=8, kind="zigzag"):
    choices = parse_choices(strategy)
    shape = AttentionShape(1, 8, kv_heads, 128, "bfloat16")
    return AttentionProblem(shape, SequenceLayout(kind, tokens, ranks), (ranks,), choices, choices)


def schedules_of(problem, write=forward_schedule):
    return [write(problem, rank) for rank in range(problem.layout.world_size)]


@pytest.mark.parametrize("write", [forward_schedule, backward_schedule])
@pytest.mark.parametrize("strategy", ["ring", "tokenring", "allgather", "ulysses", "bidirectional_ring"])
def test_a_shorter_sequence_has_the_same_steps_and_proportional_messages(strategy, write):
    problem = problem_of(strategy)
    small = shrunk(problem, 6.0)
    assert small.layout.tokens == 1600
    full, few = schedules_of(problem, write), schedules_of(small, write)
    assert same_steps(full, few)
    assert bytes_by_pair(full) == {pair: 6 * n for pair, n in bytes_by_pair(few).items()}


@pytest.mark.parametrize("cluster", ["a10x4-pcie", "ascend-full-mesh", "dgx-a100"])
@pytest.mark.parametrize("strategy", ["ring", "tokenring", "ulysses"])
@pytest.mark.parametrize("write", [forward_schedule, backward_schedule])
def test_the_scale_model_simulated_is_the_cluster_simulated_in_slow_motion(cluster, strategy, write):
    cluster = find_cluster(cluster).subset(4)
    problem, scale = problem_of(strategy), Scale(slowdown=50.0, shrink=6.0)
    full, small = schedules_of(problem, write), schedules_of(shrunk(problem, scale.shrink), write)
    held = [
        hold(s, [t * scale.slowdown for t in step_seconds(cluster, whole)]) for s, whole in zip(small, full)
    ]
    latency = cluster.levels[-1].latency_seconds
    assert all(level.latency_seconds <= latency for level in cluster.levels)
    real = simulate(full, cluster)
    model = simulate(held, scaled_cluster(cluster, scale, scale.slowdown * latency))
    # the levels of a cluster differ in latency; the scale model has one
    assert model.seconds == pytest.approx(scale.slowdown * real.seconds, rel=0.01)
    assert [s.flops for s in model.spans].count(0) == [s.flops for s in real.spans].count(0)


def test_rates_fit_the_machine():
    problem = problem_of("ring", tokens=24_000)
    cluster = find_cluster("a10x4-pcie")
    full = schedules_of(problem)
    divided = choose_rates(cluster, full, simulate(full, cluster).seconds)
    assert max(pair_rates(cluster, full).values()) / divided <= 40e6 * 1.0001


def test_pair_rates_follow_the_sizes_of_messages():
    cluster = find_cluster("dgx-a100")
    small, large = (pair_rates(cluster, schedules_of(problem_of(tokens=t))) for t in (960, 96_000))
    assert all(small[pair] < large[pair] <= cluster.route(*pair).bytes_per_second for pair in small)


def test_a_held_kernel_takes_its_time_and_returns_what_the_kernel_would():
    schedule = forward_schedule(problem_of(ranks=1, tokens=8), 0)
    attend = next(s.kernel for s in schedule.steps if isinstance(s, Compute) and isinstance(s.kernel, Attend))
    seconds = [0.03 if isinstance(s, Compute) and s.kernel is attend else 0.0 for s in schedule.steps]
    inputs = {v.name: torch.zeros(v.spec.shape, dtype=torch.bfloat16) for v in schedule.inputs}
    timeline = Timeline()
    made = Executor(None).run(hold(schedule, seconds), inputs, timeline)
    assert (made["out"].shape, made["out"].dtype) == (inputs["q"].shape, torch.bfloat16)
    longest = max(timeline.spans, key=lambda s: s.seconds)
    assert longest.name.startswith(attend.label()) and 0.03 <= longest.seconds < 0.2
    assert longest.flops == attend.work(*(v.spec for v in schedule.inputs)).flops > 0


def test_a_held_accumulation_stays_in_its_place():
    out, lse = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2)
    kernel = Merge(((0, 4),))
    merged = Held(kernel, 1000).run(out, lse, out.clone(), lse.clone())
    assert kernel.aliases and all(merged[i] is (out, lse)[j] for i, j in kernel.aliases.items())
