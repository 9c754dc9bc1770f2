"""Times of the model's modules and of the kernels of a step, taken on every rank at once, in the order of a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from counterpoint.calibration.measurement import Point, Series
from counterpoint.calibration.step import kernel_key
from counterpoint.calibration.timing import Advance
from counterpoint.kernels.kernel import torch_dtype
from counterpoint.model.decoder import Decoder
from counterpoint.runtime.executor import Executor, kernel_seconds
from counterpoint.schedule.alone import without_messages
from counterpoint.schedule.schedule import Compute, Schedule
from counterpoint.strategies.sequence.attention import backward_schedule, forward_schedule
from counterpoint.strategies.step import TrainStep
from counterpoint.training.config import TrainConfig, make_config
from counterpoint.training.mesh import Processes
from counterpoint.training.optimizer import clip_gradients, make_optimizer
from counterpoint.training.phases import ATTENTION, Phases
from counterpoint.training.step import shard

LAYERS = 2  # that are run; they are alike
ROUNDS = 4  # of anything that is timed, at least, after one that warms up
MOST_ROUNDS = 100
ATTENTION_SECONDS = 2.0  # spent on the kernels of attention, each time, unless they take longer
# phases with messages, and what the step's schedule calls the work beside them
EXCHANGES = {"gather": "unshard", "reduce": "sum", "clip": "clip"}


def measure_modules(step: TrainStep, processes: Processes) -> dict[str, Series]:
    """Seconds of every phase of the trainer's step but attention, which returns at once.

    Times are of the wall: all ranks are at work, as they are in training. Where ranks exchange messages (gathering
    parameters, reducing gradients, their norm) it is the processor's, since the simulator adds what messages take.
    """
    config: TrainConfig = make_config({})
    layers = min(LAYERS, step.model.num_hidden_layers)
    kinds = step.model.layer_types[:layers]
    model = shard(
        Decoder(replace(step.model, num_hidden_layers=layers, layer_types=kinds)), config, processes
    )
    optimizer = make_optimizer(model, config.optimizer)
    rows = step.sequence_layout().local_tokens(processes.sequence_rank % step.sequence_size)
    tokens = torch.randint(step.model.vocab_size, (1, rows))
    positions = torch.arange(rows)
    times: dict[str, list[float]] = {}
    for number in range(1 + 2 * ROUNDS):
        own = number % 2 == 0  # the first one warms up
        phases = Phases(clock=time.thread_time if own else time.perf_counter)
        with phases.watch(model):
            loss, count = model(tokens, positions, [_Nothing.apply] * layers, tokens)
            (loss / count).backward()
        phases.mark("clip")
        clip_gradients(model, config.optimizer.clip)
        phases.mark("optimizer")
        optimizer.step()
        optimizer.zero_grad()
        phases.mark("")
        for name, start, stop in phases.found if number else ():
            if name not in ATTENTION and own == (name in EXCHANGES):
                times.setdefault(name, []).append(max(stop - start, 1e-9))
    whole = step.model.parameters() / model.config.parameters()
    for name in ("clip", "optimizer"):  # they go over all parameters of the model
        times[name] = [t * whole for t in times[name]]
    return {
        f"processor/{EXCHANGES[name]}" if name in EXCHANGES else f"module/{name}": _series(name, found)
        for name, found in times.items()
    }


def measure_attention(
    step: TrainStep, processes: Processes, advance: Advance, together: Callable[[], Any], cores: float
) -> dict[str, Series]:
    """Seconds (of the wall) of every kernel of this rank's attention, with what the executor spends between kernels.

    The kernels run as the schedules order them, only without messages, so that caches are as they will be. cores: that
    the ranks share.
    """
    rank, executor = processes.sequence_rank % step.sequence_size, Executor(None)
    problems = dict.fromkeys(step.attention(layer) for layer in step.model.layers)
    schedules = [f(p, rank) for p in problems for f in (forward_schedule, backward_schedule)]
    cases = [
        (alone, {v.name: torch.randn(v.spec.shape).to(torch_dtype(v.spec.dtype)) for v in alone.inputs})
        for alone in map(without_messages, schedules)
    ]
    times: dict[str, list[float]] = {}

    def every() -> tuple[float, list[tuple[str, float]]]:
        """A round: its seconds, and those of every kernel."""
        together()
        began, processor = time.perf_counter(), time.thread_time()
        found = [pair for alone, inputs in cases for pair in _named(executor, alone, inputs)]
        own, processor = time.perf_counter() - began, time.thread_time() - processor
        total = processes.sum(processor)[0]  # known when all ranks are through
        whole = time.perf_counter() - began
        if processes.world_size > cores:
            # Who gets less of a core is waited for in training. So a rank counts by its share of the work.
            share = processor / own * processes.world_size * whole / total
            found = [(key, seconds * share) for key, seconds in found]
        return whole, found

    advance("kernels of attention")
    every()
    once = processes.largest(every()[0])
    for _ in range(min(MOST_ROUNDS, max(ROUNDS, math.ceil(ATTENTION_SECONDS / once)))):
        for key, seconds in every()[1]:
            times.setdefault(key, []).append(seconds)
    return {f"kernel/{key}": _series(key, found) for key, found in times.items()}


def _named(
    executor: Executor, schedule: Schedule, inputs: Mapping[str, Tensor]
) -> Iterator[tuple[str, float]]:
    for step, seconds in zip(schedule.steps, kernel_seconds(executor, schedule, inputs), strict=True):
        if isinstance(step, Compute):
            yield kernel_key(step.kernel, [schedule.values[name].spec for name in step.inputs]), seconds


def _series(label: str, seconds: list[float]) -> Series:
    return Series("seconds", (Point.of(1, label, seconds),))


class _Nothing(torch.autograd.Function):
    """Stands in for attention: a result and gradients of the right shapes, for the price of filling them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.like = k
        return torch.zeros_like(q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        k = torch.zeros_like(ctx.like)
        return torch.zeros_like(grads[0]), k, k
