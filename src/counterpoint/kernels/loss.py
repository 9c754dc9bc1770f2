"""Embedding, and cross entropy by the operators that torch runs one after the other, so that their buffers count.

Shapes: tokens, labels (B, S) int64; logits (B, S, V); a label of -100 asks for no loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from counterpoint.kernels.kernel import Kernel, TensorSpec, Work, register

IGNORE = -100


@register("embed")
@dataclass(frozen=True, slots=True)
class Embed(Kernel):
    """(tokens, weight (V, E)) -> rows of the weight (B, S, E)."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        tokens, weight = inputs
        return (TensorSpec((*tokens.shape, weight.shape[1]), weight.dtype),)

    def work(self, *inputs: TensorSpec) -> Work:
        rows = self.outputs(*inputs)[0].nbytes
        return Work(0, inputs[0].nbytes + rows, rows)

    def run(self, *inputs):
        tokens, weight = inputs
        return (weight[tokens],)


@register("embed_backward")
@dataclass(frozen=True, slots=True)
class EmbedBackward(Kernel):
    """(dx, tokens, weight) -> dweight, zero where no token is."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[2],)

    def work(self, *inputs: TensorSpec) -> Work:
        dx, tokens, weight = inputs
        return Work(0, 2 * dx.nbytes + tokens.nbytes, weight.nbytes + dx.nbytes)

    def run(self, *inputs):
        import torch

        dx, tokens, weight = inputs
        total = torch.zeros_like(weight)
        return (total.index_add_(0, tokens.flatten(), dx.flatten(0, 1)),)


@register("log_softmax")
@dataclass(frozen=True, slots=True)
class LogSoftmax(Kernel):
    """logits -> log-probabilities."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0],)

    def run(self, *inputs):
        return (inputs[0].log_softmax(-1),)


@register("token_loss")
@dataclass(frozen=True, slots=True)
class TokenLoss(Kernel):
    """(log-probabilities, labels) -> the sum of the losses of the tokens, shape (1,)."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (TensorSpec((1,), inputs[0].dtype),)

    def work(self, *inputs: TensorSpec) -> Work:
        return Work(0, inputs[1].nbytes + 4 * prod(inputs[1].shape), 4)

    def run(self, *inputs):
        import torch.nn.functional as F

        logs, labels = inputs
        loss = F.nll_loss(logs.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        return (loss.reshape(1),)


@register("token_loss_backward")
@dataclass(frozen=True, slots=True)
class TokenLossBackward(Kernel):
    """(log-probabilities, labels) -> their gradient: -1 at the label of a token that counts, else 0."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0],)

    def work(self, *inputs: TensorSpec) -> Work:
        return Work(0, inputs[1].nbytes, inputs[0].nbytes)

    def run(self, *inputs):
        import torch

        logs, labels = inputs
        counts = labels != IGNORE
        gradient = torch.zeros_like(logs)
        gradient.scatter_(-1, labels.clamp(min=0)[..., None], -counts[..., None].to(logs.dtype))
        return (gradient,)


@register("log_softmax_backward")
@dataclass(frozen=True, slots=True)
class LogSoftmaxBackward(Kernel):
    """(gradient, log-probabilities) -> gradient of the logits."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (inputs[0],)

    def run(self, *inputs):
        import torch

        gradient, logs = inputs
        return (torch.ops.aten._log_softmax_backward_data(gradient, logs, -1, logs.dtype),)
