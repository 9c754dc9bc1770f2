"""Attention with materialised rows of scores, for ring self-attention: scores, row softmax, weighted values.

Scores of one block of keys are (B, H, S, T), in the accumulator's dtype, -inf where a query does not see a key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from counterpoint.kernels.attention import accumulator
from counterpoint.kernels.kernel import Kernel, TensorSpec, Work, register, torch_dtype
from counterpoint.kernels.mask import Area


@register("scores")
@dataclass(frozen=True, slots=True)
class Scores(Kernel):
    """(q, k) -> scale q k^T. 2 S T H D floating-point operations."""

    areas: tuple[Area, ...]
    scale: float
    groups: tuple[int, ...]
    operator: ClassVar[str] = "matmul"

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        batch, queries, heads, _ = inputs[0].shape
        return (TensorSpec((batch, heads, queries, inputs[1].shape[1]), accumulator(inputs[0].dtype)),)

    def work(self, *inputs: TensorSpec) -> Work:
        scores = self.outputs(*inputs)[0]
        batch, heads, queries, keys = scores.shape
        flops = 2 * batch * heads * queries * keys * inputs[0].shape[3]
        return Work(flops, sum(x.nbytes for x in inputs), scores.nbytes)

    def run(self, *inputs):
        import torch

        dtype = torch_dtype(accumulator(str(inputs[0].dtype).removeprefix("torch.")))
        q, k = (x.transpose(1, 2).to(dtype) for x in inputs)
        k = k.repeat_interleave(torch.tensor(self.groups, device=k.device), 1) if max(self.groups) > 1 else k
        scores = (q @ k.transpose(-1, -2)).mul_(self.scale)
        seen = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        for a in self.areas:
            block = torch.ones(a.rows, a.columns, dtype=torch.bool, device=scores.device)
            block = block if a.hi is None else block.tril(a.hi)
            seen[a.q_start : a.q_stop, a.k_start : a.k_stop] = block if a.lo is None else block.triu(a.lo)
        return (scores.masked_fill_(~seen, -torch.inf),)


@register("row_softmax")
@dataclass(frozen=True, slots=True)
class RowSoftmax(Kernel):
    """(scores of every block) -> (probabilities of every block, lse (B, S, H))."""

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        batch, heads, queries, _ = inputs[0].shape
        return (*inputs, TensorSpec((batch, queries, heads), inputs[0].dtype))

    def run(self, *inputs):
        import torch

        lse = torch.stack([s.logsumexp(-1) for s in inputs]).logsumexp(0)
        shift = lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)
        return (*(torch.exp(s - shift) for s in inputs), lse.transpose(1, 2).contiguous())


@register("weigh")
@dataclass(frozen=True, slots=True)
class Weigh(Kernel):
    """(probabilities of a block, v) -> their part of the output (B, S, H, D). 2 S T H D floating-point operations."""

    groups: tuple[int, ...]
    operator: ClassVar[str] = "matmul"

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        batch, heads, queries, _ = inputs[0].shape
        return (TensorSpec((batch, queries, heads, inputs[1].shape[3]), inputs[0].dtype),)

    def work(self, *inputs: TensorSpec) -> Work:
        out = self.outputs(*inputs)[0]
        batch, heads, queries, keys = inputs[0].shape
        flops = 2 * batch * heads * queries * keys * inputs[1].shape[3]
        return Work(flops, sum(x.nbytes for x in inputs), out.nbytes)

    def run(self, *inputs):
        import torch

        p, v = inputs
        v = v.transpose(1, 2).to(p.dtype)
        v = v.repeat_interleave(torch.tensor(self.groups, device=v.device), 1) if max(self.groups) > 1 else v
        return ((p @ v).transpose(1, 2).contiguous(),)
