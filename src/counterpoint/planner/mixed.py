"""The attention of a model whose layers are not alike: every type by itself, and what changes of layout cost.

Softmax layers like a zigzag layout, in which causal work is equal; linear layers need tokens in order. So either hidden
states move where the types meet, or softmax layers work on contiguous tokens: both are simulated, and the sum decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from counterpoint.cluster.cluster import Cluster
from counterpoint.kernels.kernel import TensorSpec
from counterpoint.model.config import ModelConfig
from counterpoint.planner.attention import Answer, Estimate, Pass, Phase, Question, measured, plan_attention
from counterpoint.simulator.fold import fold
from counterpoint.simulator.simulate import simulate
from counterpoint.strategies.sequence.blocks import AttentionShape
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.strategies.sequence.linear import LinearProblem, parse_linear
from counterpoint.strategies.sequence.linear_builder import LinearShape
from counterpoint.strategies.sequence.relayout import relayout_schedule

LINEAR_VARIANTS = ("states", "states(wire_dtype=bfloat16)", "states_chain", "states_chain(ahead=True)")
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class MixedQuestion:
    """A model's attention on the ranks of a cluster; tokens over all ranks."""

    model: ModelConfig
    cluster: Cluster
    ranks: int
    tokens: int
    batch: int = 1
    dtype: str = "bfloat16"
    causal: bool = True
    phase: Phase = "train"

    def __post_init__(self) -> None:
        self.softmax(None, ())  # says what is wrong with ranks and tokens

    def softmax(self, window: int | None, layouts: tuple[str, ...]) -> Question:
        """The question that the softmax layers of a window ask."""
        m = self.model
        shape = AttentionShape(
            self.batch, m.num_attention_heads, m.num_key_value_heads, m.head_dim, self.dtype
        )
        return Question(
            shape, self.cluster, self.ranks, self.tokens, 0, self.causal, window, self.phase, layouts
        )

    @property
    def passes(self) -> tuple[Pass, ...]:
        return ("forward", "backward") if self.phase == "train" else ("forward",)


@dataclass(frozen=True, slots=True)
class LayerType:
    """Layers that are alike: their name, and which they are. window: of softmax layers, None for all keys."""

    name: str
    layers: tuple[int, ...]
    window: int | None = None

    @property
    def linear(self) -> bool:
        return self.name == "linear_attention"


@dataclass(frozen=True, slots=True)
class Line:
    """How layers of a type are best run in a layout, and what one of them costs."""

    type: LayerType
    answer: Answer

    @property
    def seconds(self) -> float:
        """Of all layers of the type."""
        return len(self.type.layers) * self.answer.seconds


@dataclass(frozen=True, slots=True)
class MixedAnswer:
    """One way to run all layers. moves: changes of layout in a forward pass; move_seconds: of all, in all passes."""

    lines: tuple[Line, ...]
    moves: int
    move_seconds: float

    @property
    def layout(self) -> str:
        """That of softmax layers."""
        return next((line.answer.layout for line in self.lines if not line.type.linear), "contiguous")

    @property
    def seconds(self) -> float:
        return sum(line.seconds for line in self.lines) + self.move_seconds

    def to_json(self) -> dict[str, Any]:
        lines = [
            {
                "type": line.type.name, "window": line.type.window, "layers": len(line.type.layers),
                "seconds": line.seconds, "answer": line.answer.to_json(),
            }
            for line in self.lines
        ]  # fmt: skip
        moves = {"moves": self.moves, "move_seconds": self.move_seconds}
        return {"layout": self.layout, "seconds": self.seconds, **moves, "layers": lines}


@dataclass(frozen=True, slots=True)
class MixedPlan:
    """Ways to run the whole model, the fastest first; and for every layer type all that was tried, by time."""

    answers: tuple[MixedAnswer, ...]
    tried: tuple[tuple[LayerType, tuple[Answer, ...]], ...]


def layer_types(model: ModelConfig) -> tuple[LayerType, ...]:
    """The types of a model's layers, in the order of their first layer."""
    found: dict[tuple[str, int | None], list[int]] = {}
    for layer in model.layers:
        window = model.window(layer)
        name = (
            "linear_attention"
            if model.is_linear(layer)
            else "sliding_attention"
            if window
            else "full_attention"
        )
        found.setdefault((name, window), []).append(layer)
    return tuple(LayerType(name, tuple(layers), window) for (name, window), layers in found.items())


def plan_mixed(question: MixedQuestion, progress: Progress | None = None) -> MixedPlan:
    """Simulate the strategies of every layer type, in every layout that suits it, and the ways between layouts.

    Raises ValueError when a type of layers cannot run at all.
    """
    types, say = layer_types(question.model), progress or (lambda _: None)
    softmax = [t for t in types if not t.linear]
    layouts = ("zigzag", "contiguous") if question.causal and softmax else ("contiguous",)
    tried: dict[LayerType, list[Answer]] = {}
    for kind in types:
        say(kind.name)
        if kind.linear:
            tried[kind] = linear_answers(question)
        else:
            tried[kind] = list(plan_attention(question.softmax(kind.window, layouts)).answers)
    answers = []
    for layout in layouts:
        lines = []
        for kind in types:
            fitting = [a for a in tried[kind] if kind.linear or a.layout == layout]
            lines += [Line(kind, min(fitting, key=lambda a: a.seconds))] if fitting else []
        if len(lines) == len(types):
            say(f"changes of layout to {layout}")
            answers.append(MixedAnswer(tuple(lines), *_moves(question, types, layout)))
    answers.sort(key=lambda a: a.seconds)
    return MixedPlan(tuple(answers), tuple((kind, tuple(tried[kind])) for kind in types))


def linear_answers(question: MixedQuestion) -> list[Answer]:
    """Every strategy of linear attention, by time."""
    found = []
    for name in LINEAR_VARIANTS:
        passes = [measured((name,), predict_linear(question, name, which)) for which in question.passes]
        backward: Estimate | None = passes[1] if len(passes) > 1 else None
        found.append(Answer((question.ranks,), "contiguous", passes[0], backward))
    return sorted(found, key=lambda a: a.seconds)


def predict_linear(question: MixedQuestion, strategy: str, which: Pass):
    """The simulated timeline of one pass of a linear layer."""
    linear = question.model.linear
    assert linear is not None
    shape = LinearShape(
        question.batch, linear.num_heads, linear.key_head_dim, linear.value_head_dim,
        linear.decay_form, question.dtype,  # type: ignore[arg-type]
    )  # fmt: skip
    choice = parse_linear(strategy)
    layout = SequenceLayout("contiguous", question.tokens, question.ranks)
    problem = LinearProblem(shape, layout, choice, choice, question.causal)
    schedules, symmetry = fold(partial(problem.schedule, which), (question.ranks,))
    return simulate(schedules, question.cluster, symmetry=symmetry)


def _moves(question: MixedQuestion, types: tuple[LayerType, ...], layout: str) -> tuple[int, float]:
    """How often hidden states change their layout in a forward pass, and seconds of that in all passes."""
    borders = list(_borders(types)) if layout != "contiguous" and question.ranks > 1 else []
    if not borders:
        return 0, 0.0
    spec = TensorSpec((question.batch, 0, question.model.hidden_size), question.dtype)
    ordered, other = (
        SequenceLayout(kind, question.tokens, question.ranks) for kind in ("contiguous", layout)
    )
    ways = [(other, ordered), (ordered, other)]

    def seconds(way: tuple[SequenceLayout, SequenceLayout]) -> float:
        schedules = [relayout_schedule(spec, *way, rank) for rank in range(question.ranks)]
        return simulate(schedules, question.cluster).seconds

    to_ordered, back = map(seconds, ways)
    total = 0.0
    for into_linear in borders:  # the backward pass takes the way back
        total += to_ordered if into_linear else back
        total += (back if into_linear else to_ordered) * (len(question.passes) - 1)
    return len(borders), total


def _borders(types: tuple[LayerType, ...]) -> Iterator[bool]:
    """For every layer whose layout is another than that before it, whether it is linear."""
    linear = {layer: kind.linear for kind in types for layer in kind.layers}
    for before, here in pairwise(linear[layer] for layer in sorted(linear)):
        if before != here:
            yield here
