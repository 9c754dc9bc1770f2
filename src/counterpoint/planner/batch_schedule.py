"""A plan of a ragged batch as schedules: one layer, forward and backward, of every group of every micro-batch.

A group's attention is the strategy's own schedule, placed on its ranks of the world. The matrix products of the layer
stand before and behind it as one kernel each, so that attention waits for them and they for attention. Left out, for
all plans alike: norms, embeddings and loss, and the reduction of gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

from counterpoint.kernels.kernel import Kernel, TensorSpec, Work, register, torch_dtype
from counterpoint.model.config import ModelConfig
from counterpoint.planner.batch import BatchPlan, Group
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.place import placed
from counterpoint.schedule.schedule import Schedule, Value
from counterpoint.strategies.sequence.attention import (
    AttentionProblem,
    Choices,
    backward_schedule,
    forward_schedule,
    parse_choices,
)
from counterpoint.strategies.sequence.blocks import AttentionShape
from counterpoint.strategies.sequence.layout import SequenceLayout


@register("products")
@dataclass(frozen=True, slots=True)
class Products(Kernel):
    """Matrix products of `tokens` tokens with `parameters` weights, `times` over; what they give has these specs."""

    specs: tuple[TensorSpec, ...]
    tokens: int
    parameters: int
    times: int = 1

    operator = "matmul"

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return self.specs

    def work(self, *inputs: TensorSpec) -> Work:
        return Work(2 * self.tokens * self.parameters * self.times)

    def run(self, *inputs):
        import torch

        return tuple(torch.zeros(spec.shape, dtype=torch_dtype(spec.dtype)) for spec in self.specs)

    def label(self) -> str:
        return "products"


def group_problem(
    plan: BatchPlan, group: Group, shape: AttentionShape, strategy: Choices
) -> AttentionProblem:
    """The attention of a group over its packed sequences, each in balanced pieces over all of its ranks."""
    lengths = tuple(plan.lengths[i] for i in group.sequences)
    layout = SequenceLayout("document-zigzag", sum(lengths), len(group.ranks), lengths)
    choices = parse_choices(strategy)
    return AttentionProblem(shape, layout, (len(group.ranks),), choices, choices)


def batch_schedule(
    plan: BatchPlan,
    model: ModelConfig,
    rank: int,
    *,
    strategy: Choices,
    dtype: str,
    head_dim: int | None = None,
) -> Schedule:
    """One layer of a rank's part of a plan; a rank without work has no steps.

    head_dim: of the messages, when it is to differ from the model's (messages of another size, the same steps).
    """
    shape = AttentionShape(
        1, model.num_attention_heads, model.num_key_value_heads, head_dim or model.head_dim, dtype
    )
    b = Builder(f"{plan.solver} batch", rank, plan.world_size)
    before, behind = _parameters(model)
    ended: list[Value] = []
    for _, group in plan.of_rank(rank):
        problem, place = group_problem(plan, group, shape, strategy), group.ranks.index(rank)
        forward, backward = (
            placed(write(problem, place), group.ranks, plan.world_size)
            for write in (forward_schedule, backward_schedule)
        )
        tokens = problem.layout.local_tokens(place)
        given = _given(b, forward, ended[-1:], Products((), tokens, before), "qkv")
        made = b.inline(forward, given)
        state = TensorSpec((1, tokens, 1), dtype)  # stands for what the next product needs
        (hidden,) = b.compute(Products((state,), tokens, behind), *_arrived(made), names=["hidden"])
        known = {**given, **made}
        wanted = [v for v in backward.inputs if v.name == "dout"]
        known |= zip(
            [v.name for v in wanted],
            b.compute(
                Products(tuple(v.spec for v in wanted) or (state,), tokens, behind, 2), hidden, names=["dout"]
            ),
            strict=False,
        )
        grads = b.inline(backward, known)
        ended += b.compute(
            Products((state,), tokens, before, 2), *(_arrived(grads) or [hidden]), names=["done"]
        )
    return b.finish({f"micro_batch{i}": value for i, value in enumerate(ended)})


def _given(
    b: Builder, schedule: Schedule, after: list[Value], kernel: Products, name: str
) -> dict[str, Value]:
    """The inputs of a schedule as results of one kernel that runs behind what came before."""
    specs = tuple(v.spec for v in schedule.inputs)
    if not specs:
        return {}
    made = b.compute(
        Products(specs, kernel.tokens, kernel.parameters), *after, names=[v.name for v in schedule.inputs]
    )
    return dict(zip((v.name for v in schedule.inputs), made, strict=True))


def _arrived(made: dict[str, Value]) -> list[Value]:
    """Everything that a schedule handed back, once."""
    return list({value.name: value for value in made.values()}.values())


def _parameters(model: ModelConfig) -> tuple[int, int]:
    """Weights of a layer's products in front of attention and behind it."""
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    before = model.hidden_size * (q + 2 * kv)
    return before, model.hidden_size * (q + 3 * model.intermediate_size)
