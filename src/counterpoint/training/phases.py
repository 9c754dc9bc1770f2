"""The phases of a training step as it runs: which part of the model is at work, between two marks.

Hooks are on the model only while a step is recorded. The phases bear the names of strategies/step.py, so that a
recorded step and a simulated one can be laid side by side. What happens inside attention is recorded by the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from counterpoint.model.decoder import Decoder
from counterpoint.schedule.timeline import Span, Timeline

ATTENTION = ("attention forward", "attention backward")
STATE = ("gather", "reduce")


@dataclass(slots=True)
class Phases:
    """A phase begins with a mark and ends with the next; `clock` gives the time (s)."""

    clock: Callable[[], float] = perf_counter
    found: list[tuple[str, float, float]] = field(default_factory=list)  # name, start, stop (s)
    name: str = ""
    began: float = 0.0

    def mark(self, name: str) -> None:
        """The phase `name` begins; "" when none does."""
        if name == self.name:
            return
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # or the mark would tell when kernels were launched
        now = self.clock()
        if self.name:
            self.found.append((self.name, self.began, now))
        self.name, self.began = name, now

    def attend(self, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """Attention, marked."""
        self.mark("attention forward")
        out = function(*inputs)
        self.mark("out")
        for x in inputs:  # the backward pass of whichever comes first begins when attention's is done
            _at_gradient(x, partial(self.mark, "qkv backward"))
        _at_gradient(out, partial(self.mark, "attention backward"))
        return out

    @contextmanager
    def watch(self, model: Decoder) -> Iterator[None]:
        """Hooks on the modules of the model and around its attention, for as long as the context is open."""
        trunk, handles = model.model, []

        def marked(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            tokens, positions, attend, *rest = inputs
            if callable(attend):
                return tokens, positions, _Watched(self, attend), *rest
            return tokens, positions, [_Watched(self, one) for one in attend], *rest

        def before(module: nn.Module, name: str, gradient: str = "") -> None:
            def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
                self.mark(name)
                if gradient:
                    _at_gradient(inputs[0], partial(self.mark, gradient))

            handles.append(module.register_forward_pre_hook(hook))

        def after(module: nn.Module, name: str, gradient: str) -> None:
            def hook(_: nn.Module, __: Any, output: Tensor) -> None:
                self.mark(name)
                _at_gradient(output, partial(self.mark, gradient))

            handles.append(module.register_forward_hook(hook))

        sharded = isinstance(model, FSDPModule)
        first = "gather" if sharded else "embedding"
        # before whatever else is done when the model is called, and after it
        handles.append(model.register_forward_pre_hook(lambda *_: self.mark(first), prepend=True))
        handles.append(model.register_forward_hook(lambda *_: self.mark("head backward")))
        handles.append(trunk.register_forward_pre_hook(marked))
        before(trunk.embed_tokens, "embedding")
        after(trunk.embed_tokens, "gather" if sharded else "qkv", "embedding backward")
        for layer in trunk.layers:
            assert isinstance(layer.post_attention_layernorm, nn.Module)
            before(layer, "qkv", "reduce" if sharded else "")
            before(layer.post_attention_layernorm, "mlp", "out backward")
            after(layer, "gather" if sharded else "qkv", "mlp backward")
        before(trunk.norm, "head")
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add_to(self, timeline: Timeline, rank: int) -> None:
        """Ends the last phase and adds all of them to a timeline that holds the attention of the same step."""
        self.mark("")
        inside = sorted((start, stop, name) for name, start, stop in self.found if name in ATTENTION)
        spans, at = [], 0
        for span in sorted(timeline.spans, key=lambda s: s.start):
            while at + 1 < len(inside) and inside[at + 1][0] <= span.start:
                at += 1
            spans.append(replace(span, phase=inside[at][2]) if inside else span)
        for name, start, stop in self.found:
            if name in STATE:
                spans.append(Span(rank, "state", "collective", name, start, stop, phase=name))
            elif name not in ATTENTION:
                spans.append(Span(rank, "compute", "compute", name, start, stop, phase=name))
        timeline.spans[:] = sorted(spans, key=lambda s: s.start)


@dataclass(frozen=True, slots=True)
class _Watched:
    """How the tokens of a layer meet, marked; a convolution before linear attention belongs to what is before it."""

    phases: Phases
    mix: Any

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        return self.phases.attend(self.mix, *inputs)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.mix.convolve(x, weight)


def _at_gradient(tensor: Any, call: Callable[[], None]) -> None:
    """Calls when the gradient of a tensor is known, which is when the backward pass of what made it begins."""
    if isinstance(tensor, Tensor) and tensor.requires_grad:

        def hook(_: Tensor) -> None:
            call()

        tensor.register_hook(hook)
