"""Linear attention over a sharded sequence: the problem and its schedules.

    S_t = diag(a_t) S_(t-1) + k_t v_t^T        o_t = scale q_t S_t

without decays (a = 1, basic linear attention), with one decay per head and token (retention, Mamba-2) or one per
channel (gated linear attention). Without a causal mask a token sees those behind it too, under the decays between:
o_t = scale sum over j of (prod of a from min(t, j) + 1 to max(t, j)) q_t k_j v_j. Tokens see their own document only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from counterpoint.kernels.kernel import TensorSpec
from counterpoint.kernels.linear import Way
from counterpoint.schedule.schedule import Schedule, Value
from counterpoint.strategies.sequence import states, states_chain
from counterpoint.strategies.sequence.choices import Choice, check_options, options_of, parse_choice
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.strategies.sequence.linear_builder import Inputs, LinearBuilder, LinearShape


@dataclass(frozen=True, slots=True)
class LinearStrategy:
    """A pair of functions that write a pass with a `LinearBuilder`."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


LINEAR_STRATEGIES: Mapping[str, LinearStrategy] = {
    "states": LinearStrategy(states.forward, states.backward),
    "states_chain": LinearStrategy(states_chain.forward, states_chain.backward),
}


def parse_linear(given: str | Choice) -> Choice:
    """A strategy from its name: "states" (LASP-2), "states_chain(ahead=true)" (LASP-1). ValueError if unknown."""
    return given if isinstance(given, Choice) else parse_choice(given, tuple(LINEAR_STRATEGIES))


@dataclass(frozen=True)
class LinearProblem:
    """Linear attention over a sequence that is sharded over ranks, and how to do it.

    layout: contiguous, since states follow the order of tokens. Raises ValueError for another one.
    """

    shape: LinearShape
    layout: SequenceLayout
    forward: Choice
    backward: Choice
    causal: bool = True

    def __post_init__(self) -> None:
        if self.layout.kind != "contiguous" and self.layout.world_size > 1:
            raise ValueError(
                f"linear attention takes tokens in order, but the layout is {self.layout.kind}; use a contiguous one "
                "(counterpoint.relayout brings tensors there)"
            )
        for name, choice in (("forward", self.forward), ("backward", self.backward)):
            known = LINEAR_STRATEGIES.get(choice.name)
            functions = (known.forward, known.backward) if known else ()
            check_options(choice, name, functions, tuple(LINEAR_STRATEGIES))

    def schedule(self, which: Literal["forward", "backward"], rank: int) -> Schedule:
        """One pass of one rank."""
        return (forward_schedule if which == "forward" else backward_schedule)(self, rank)


@lru_cache(maxsize=1024)
def forward_schedule(problem: LinearProblem, rank: int) -> Schedule:
    """The forward pass of one rank: given q, k, v and g, returns out and what its backward pass needs.

    q, k (batch, local tokens, heads, key_dim); v, out (batch, local tokens, heads, value_dim); g, the log decays,
    (batch, local tokens, heads, 1 or key_dim) in the accumulator's dtype. A rank without tokens has no steps.
    """
    b = _builder("forward", problem, problem.forward, rank)
    if not b.reach.segments:
        return b.finish({})
    strategy, x = LINEAR_STRATEGIES[problem.forward.name], _inputs(b, problem, rank)
    out, arrived, left = _call(strategy.forward, problem.forward, b, x)
    outputs = {"out": b.cast(out, problem.shape.dtype)}
    outputs |= {f"saved.arrived.{way}": value for way, value in arrived.items()}
    if problem.shape.decay != "none":  # gradients of decays go through what left the rank
        outputs |= {f"saved.left.{way}": left[way] for way in b.ways if b.reach.targets[way]}
    return b.finish(outputs)


@lru_cache(maxsize=1024)
def backward_schedule(problem: LinearProblem, rank: int) -> Schedule:
    """The backward pass of one rank: given dout and what the forward schedule saw and returned; returns dq, dk, dv, dg.

    Its inputs carry the names of the forward schedule's inputs and outputs, and "dout".
    """
    given = forward_schedule(problem, rank)
    b = _builder("backward", problem, problem.backward, rank)
    if not b.reach.segments:
        return b.finish({})
    x = _inputs(b, problem, rank)
    saved: dict[str, dict[Way, Value]] = {"arrived": {}, "left": {}}
    for key, name in given.outputs.items():
        if key.startswith("saved."):
            _, what, way = key.split(".")
            saved[what][way] = b.input(key, given.values[name].spec)  # type: ignore[index]
    dout = b.input("dout", x.v.spec)
    strategy = LINEAR_STRATEGIES[problem.backward.name]
    grads, dg = _call(strategy.backward, problem.backward, b, x, dout, saved["arrived"], saved["left"])
    names = ("dq", "dk", "dv")
    sums = {name: b.total([grads[part][i] for part in b.parts]) for i, name in enumerate(names)}
    results = {name: b.cast(value, problem.shape.dtype) for name, value in sums.items()}
    return b.finish({**results, **({"dg": dg[0]} if dg else {})})


def _call(function: Callable[..., Any], choice: Choice, *arguments: Any) -> Any:
    return function(
        *arguments, **{key: value for key, value in choice.options if key in options_of(function)}
    )


def _builder(which: str, problem: LinearProblem, choice: Choice, rank: int) -> LinearBuilder:
    if not 0 <= rank < problem.layout.world_size:
        raise ValueError(f"rank is {rank}; the layout has ranks 0 to {problem.layout.world_size - 1}")
    return LinearBuilder(f"{which} {choice}", rank, problem.shape, problem.layout, problem.causal)


def _inputs(b: LinearBuilder, problem: LinearProblem, rank: int) -> Inputs:
    shape, tokens = problem.shape, problem.layout.local_tokens(rank)
    keys = TensorSpec((shape.batch, tokens, shape.heads, shape.key_dim), shape.dtype)
    values = keys.with_size(3, shape.value_dim)
    gates = TensorSpec((shape.batch, tokens, shape.heads, shape.decay_width), shape.state.dtype)
    q, k, v = b.input("q", keys), b.input("k", keys), b.input("v", values)
    return Inputs(q, k, v, b.input("g", gates) if shape.decay_width else None)
