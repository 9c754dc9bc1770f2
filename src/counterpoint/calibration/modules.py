"""Times of the model's modules and of the kernels of a step, taken on every rank at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from counterpoint.calibration.measurement import Point, Series
from counterpoint.calibration.timing import Advance, Effort, Stopwatch, sample
from counterpoint.kernels.kernel import Kernel, TensorSpec, torch_dtype
from counterpoint.model.decoder import Decoder
from counterpoint.strategies.step import TrainStep
from counterpoint.training.config import TrainConfig, make_config
from counterpoint.training.mesh import Processes
from counterpoint.training.optimizer import clip_gradients, make_optimizer
from counterpoint.training.phases import ATTENTION, STATE, Phases
from counterpoint.training.step import shard

LAYERS = 2  # that are run; they are alike
ROUNDS = 4  # timed steps, after one that warms up


def measure_modules(step: TrainStep, processes: Processes, own: bool) -> dict[str, Series]:
    """Seconds of every phase of the trainer's step but attention, which returns at once.

    own: processor time of this thread rather than time that passes.
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
    for number in range(1 + ROUNDS):
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
            if name not in (*ATTENTION, *STATE):
                times.setdefault(name, []).append(max(stop - start, 1e-9))
    whole = step.model.parameters() / model.config.parameters()
    for name in ("clip", "optimizer"):  # they go over all parameters of the model
        times[name] = [t * whole for t in times[name]]
    return {f"module/{name}": Series("seconds", (Point.of(1, name, found),)) for name, found in times.items()}


def measure_kernels(
    kernels: Mapping[str, tuple[Kernel, tuple[TensorSpec, ...]]],
    effort: Effort,
    advance: Advance,
    together: Callable[[], Any],
    stopwatch: Stopwatch,
) -> dict[str, Series]:
    """Seconds of every kernel at its own size."""
    found = {}
    with torch.no_grad():
        for key, (kernel, specs) in kernels.items():
            advance(kernel.label())
            inputs = [torch.randn(s.shape).to(torch_dtype(s.dtype)) for s in specs]
            together()
            point = sample(lambda k=kernel, x=inputs: k.run(*x), 1, kernel.label(), effort, stopwatch)
            found[f"kernel/{key}"] = Series("seconds", (point,))
    return found


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
