"""The parts of a training step, measured, and what is predicted from them."""

import os
from time import perf_counter

import pytest
import torch

from counterpoint.calibration.machine import this_machine
from counterpoint.calibration.step import calibrate_step, kernel_key
from counterpoint.kernels.module import Module
from counterpoint.kernels.pointwise import After
from counterpoint.planner.step import predict_step
from counterpoint.runtime.executor import Executor, kernel_seconds
from counterpoint.schedule.alone import without_messages
from counterpoint.schedule.schedule import Compute
from counterpoint.strategies.sequence.attention import backward_schedule, forward_schedule
from counterpoint.strategies.step import step_schedule
from counterpoint.training.config import make_config
from counterpoint.training.predict import step_of


def step_over(ranks: int, tokens: int, strategy: str = "tokenring"):
    return step_of(
        make_config(
            {
                "data": {"sequence_length": tokens},
                "parallel": {"sequence": ranks, "forward": strategy},
                "training": {"global_batch": 1},
            }
        )
    )


@pytest.mark.parametrize("strategy", ["tokenring", "ring", "ulysses", "allgather", "rsa"])
def test_a_rank_alone_computes_what_its_schedule_computes(strategy):
    problem = step_over(4, 64, strategy).attention(0)
    for schedule in (forward_schedule(problem, 1), backward_schedule(problem, 1)):
        alone = without_messages(schedule)
        assert alone.steps == tuple(s for s in schedule.steps if isinstance(s, Compute))
        given, made = ({v.name for v in values} for values in (alone.inputs, schedule.values.values()))
        computed = {v.name for s in alone.steps for v in s.writes}
        assert given | computed == made and not given & computed
        inputs = {v.name: torch.randn(v.spec.shape) for v in alone.inputs}
        began = perf_counter()
        found = kernel_seconds(Executor(None), alone, inputs)
        assert len(found) == len(alone.steps)
        assert 0 < sum(found) <= perf_counter() - began


@pytest.mark.processes
@pytest.mark.slow
def test_a_step_is_predicted_from_its_parts(tmp_path):
    step = step_over(2, 256)
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    measured = calibrate_step(step, this_machine(), environ)
    kernels = measured.points("kernel/")
    for rank in range(2):
        schedule = step_schedule(step, rank)
        for s in schedule.steps:
            if isinstance(s, Compute) and not isinstance(s.kernel, Module | After):
                assert kernel_key(s.kernel, _specs(schedule, s)) in kernels
    assert set(measured.points("processor/")) == {"unshard", "sum", "clip"}
    assert {"qkv", "mlp backward", "head", "optimizer"} <= set(measured.points("module/"))
    found = predict_step(step, measured.cluster(), costs=measured.costs())
    assert sum(found.phases.values()) == pytest.approx(found.seconds)
    everything = sum(s.points[0].typical for s in measured.points("module/").values())
    assert found.seconds > everything  # and there are two layers of four in it
    assert calibrate_step(step, this_machine(), environ).date == measured.date, "it is kept"


def _specs(schedule, step):
    return [schedule.values[name].spec for name in step.inputs]
