"""From a problem to schedules: strategies by name, nested over the axes of a mesh, written out for every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import prod
from typing import Literal

from counterpoint.kernels.kernel import TensorSpec
from counterpoint.kernels.mask import AttentionMask
from counterpoint.kernels.tokens import Tokens
from counterpoint.schedule.schedule import Schedule, Value
from counterpoint.strategies.sequence import allgather, bidirectional_ring, ring, rsa, tokenring, ulysses
from counterpoint.strategies.sequence.blocks import AttentionShape, Axis, Block
from counterpoint.strategies.sequence.builder import AttentionBuilder
from counterpoint.strategies.sequence.choices import Choice, check_options, options_of, parse_choice
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.strategies.sequence.tree import Branches, Tree


@dataclass(frozen=True, slots=True)
class Strategy:
    """A pair of functions, and where they may stand when strategies nest.

    nesting: -1 must come first (it changes which heads a rank has), 1 must come last (it needs whole rows).
    """

    forward: Callable[..., Block]
    backward: Callable[..., tuple[Block, Block]]
    nesting: int = 0


STRATEGIES: Mapping[str, Strategy] = {
    "ring": Strategy(ring.forward, ring.backward),
    "bidirectional_ring": Strategy(bidirectional_ring.forward, bidirectional_ring.backward),
    "tokenring": Strategy(tokenring.forward, tokenring.backward),
    "allgather": Strategy(allgather.forward, allgather.backward),
    "ulysses": Strategy(ulysses.forward, ulysses.backward, nesting=-1),
    "rsa": Strategy(rsa.forward, rsa.backward, nesting=1),
}


Choices = str | Choice | tuple["str | Choice", ...] | list["str | Choice"]


def parse_choices(given: Choices) -> tuple[Choice, ...]:
    """Strategies from names: "ring", "tokenring(packets=4, relay=false)", ("ring", "ulysses") or "ring/ulysses".

    One per mesh axis, outermost first. Raises ValueError for an unknown strategy, with the known ones.
    """
    parts = (
        given.split("/") if isinstance(given, str) else [given] if isinstance(given, Choice) else list(given)
    )
    return tuple(
        part if isinstance(part, Choice) else parse_choice(part, tuple(STRATEGIES)) for part in parts
    )


@dataclass(frozen=True)
class AttentionProblem:
    """Attention over a sequence that is sharded over the ranks of a mesh, and how to do it.

    mesh: sizes of the mesh axes, outermost first; their product is the layout's world size and ranks number the
    mesh row by row. forward, backward: one strategy per axis. wants_lse: hand the logsumexp out as well.
    cached: where the keys and values of earlier tokens lie, which the layout's tokens follow; a rank's k and v then
    hold its cached tokens first and its new ones behind them.
    """

    shape: AttentionShape
    layout: SequenceLayout
    mesh: tuple[int, ...]
    forward: tuple[Choice, ...]
    backward: tuple[Choice, ...]
    causal: bool = True
    window: int | None = None
    wants_lse: bool = False
    cached: SequenceLayout | None = None

    def __post_init__(self) -> None:
        if self.cached is not None and self.cached.world_size != self.layout.world_size:
            raise ValueError(
                f"the cache lies on {self.cached.world_size} ranks, the new tokens on {self.layout.world_size}; "
                "both must use the same ranks"
            )
        if self.cached is not None and (self.cached.documents or self.layout.documents):
            raise ValueError(
                "a cache holds one document; leave documents out, or attend document by document"
            )
        if prod(self.mesh) != self.layout.world_size:
            raise ValueError(
                f"the layout is for {self.layout.world_size} ranks, but the mesh {'x'.join(map(str, self.mesh))} "
                f"has {prod(self.mesh)}"
            )
        for name, choices in (("forward", self.forward), ("backward", self.backward)):
            if len(choices) != len(self.mesh):
                raise ValueError(
                    f"{name} names {len(choices)} strategies ({', '.join(map(str, choices))}) for a mesh with "
                    f"{len(self.mesh)} axes; give one per axis, outermost first"
                )
            for choice in choices:
                known = STRATEGIES.get(choice.name)
                functions = (known.forward, known.backward) if known else ()
                check_options(choice, name, functions, tuple(STRATEGIES))

    @property
    def mask(self) -> AttentionMask:
        return AttentionMask(self.causal, self.window, self.layout.documents)

    def queries(self, rank: int) -> Tokens:
        """The positions of a rank's queries."""
        local = self.layout.local(rank)
        return local if self.cached is None else local.shifted(self.cached.tokens)

    def keys(self, rank: int) -> Tokens:
        """The positions of a rank's keys: cached ones, then its own."""
        if self.cached is None:
            return self.queries(rank)
        return Tokens((*self.cached.local(rank).runs, *self.queries(rank).runs))

    def schedule(self, which: Literal["forward", "backward"], rank: int) -> Schedule:
        """One pass of one rank."""
        return (forward_schedule if which == "forward" else backward_schedule)(self, rank)

    @property
    def keeps_heads(self) -> bool:
        """The forward pass leaves its exchanged heads for the backward pass."""
        return "ulysses" in {c.name for c in self.forward} and self.forward_levels == self.backward_levels

    @property
    def forward_levels(self) -> tuple[Level, ...]:
        return _levels(self.forward)

    @property
    def backward_levels(self) -> tuple[Level, ...]:
        return _levels(self.backward)


Level = tuple[str, tuple[int, ...]]  # strategy, and the mesh axes it works on


def _levels(choices: tuple[Choice, ...]) -> tuple[Level, ...]:
    """Nesting order: heads first, then loops from the outermost axis in, whole rows last.

    Several axes under a strategy that may stand only first (or last) become one longer axis.
    """
    levels: list[Level] = []
    for nesting in (-1, 0, 1):
        axes = tuple(i for i, c in enumerate(choices) if STRATEGIES[c.name].nesting == nesting)
        if nesting == 0:
            levels += [(str(choices[i]), (i,)) for i in axes]
        elif axes:
            levels.append((str(choices[axes[0]]), axes))
    return tuple(levels)


def forward_schedule(problem: AttentionProblem, rank: int) -> Schedule:
    """The forward pass of one rank: given q, k, v; returns out, lse if wanted, and what its backward pass needs.

    q, out (batch, local tokens, heads, head_dim); k, v (batch, local tokens, kv_heads, head_dim);
    lse (batch, local tokens, heads).
    """
    return _forward(problem, rank)[0]


@lru_cache(maxsize=1024)
def _forward(problem: AttentionProblem, rank: int) -> tuple[Schedule, dict[str, Block]]:
    """The forward schedule, and the blocks it saves for its own backward pass."""
    keeps = problem.keeps_heads
    b = _builder("forward " + "/".join(map(str, problem.forward)), problem, problem.forward_levels, rank)
    b.wants_lse = problem.wants_lse or not keeps
    b.saved = {} if keeps else None
    q, kv = _inputs(b, problem, problem.forward_levels, rank)
    out = _nest(b, problem, problem.forward_levels, problem.forward, rank, "forward")(q, kv)
    final = b.cast(replace(out, values=out.values[:1], specs=out.specs[:1]), problem.shape.dtype)
    outputs: dict[str, Value] = dict(
        zip(("out", "lse"), (*final.values, *(out.values[1:] if b.wants_lse else ())), strict=False)
    )
    for name, block in (b.saved or {}).items():
        outputs |= {f"saved.{name}.{i}": v for i, v in enumerate(block.values)}
    return b.finish(outputs), b.saved or {}


@lru_cache(maxsize=1024)
def backward_schedule(problem: AttentionProblem, rank: int) -> Schedule:
    """The backward pass of one rank: given dout and what the forward schedule saw and returned; returns dq, dk, dv.

    Its inputs carry the names of the forward schedule's inputs and outputs, and "dout".
    """
    b = _builder("backward " + "/".join(map(str, problem.backward)), problem, problem.backward_levels, rank)
    q, kv = _inputs(b, problem, problem.backward_levels, rank)
    if problem.keeps_heads:
        b.saved = {
            name: replace(
                block, values=tuple(b.input(f"saved.{name}.{i}", v.spec) for i, v in enumerate(block.values))
            )
            for name, block in _forward(problem, rank)[1].items()
        }
    specs = b.attention_specs(q)
    out = Block((b.input("out", specs[0]), b.input("lse", specs[1])) if q else (), specs, q.tokens, q.heads)
    dout = Block((b.input("dout", q.specs[0]),) if q else (), q.specs, q.tokens, q.heads)
    packet = b.packet(q, dout, out)
    dq, dkv = _nest(b, problem, problem.backward_levels, problem.backward, rank, "backward")(packet, kv)
    grads: dict[str, Value] = {}
    for names, block in ((("dq",), dq), (("dk", "dv"), dkv)):
        grads |= zip(names, b.cast(block, problem.shape.dtype).values, strict=False)
    return b.finish(grads)


def _nest(b: AttentionBuilder, problem: AttentionProblem, levels, choices, rank: int, way: str) -> Callable:
    """The strategies of all levels as one function of (q, kv): each calls the next one, the last one the kernel."""

    def call(function: Callable, axis: Axis, choice: Choice, inner: Callable) -> Callable:
        options = {key: value for key, value in choice.options if key in options_of(function)}
        return lambda q, kv: function(b, axis, q, kv, inner, **options)

    attend: Callable = b.attend if way == "forward" else b.attend_backward
    for axis, choice in reversed(_axes(problem, levels, choices, rank)):
        attend = call(getattr(STRATEGIES[choice.name], way), axis, choice, attend)
    return attend


def _builder(name: str, problem: AttentionProblem, levels: tuple[Level, ...], rank: int) -> AttentionBuilder:
    world_size = problem.layout.world_size
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}; the mesh has ranks 0 to {world_size - 1}")
    place = tuple(_place(problem.mesh, axes, rank) for _, axes in levels)
    return AttentionBuilder(name, rank, world_size, problem.shape, problem.mask, place)


def _inputs(
    b: AttentionBuilder, problem: AttentionProblem, levels: tuple[Level, ...], rank: int
) -> tuple[Block, Block]:
    shape = problem.shape
    counts = problem.queries(rank).count, problem.keys(rank).count
    q = TensorSpec((shape.batch, counts[0], shape.heads, shape.head_dim), shape.dtype)
    kv = TensorSpec((shape.batch, counts[1], shape.kv_heads, shape.head_dim), shape.dtype)
    queries = _tree(problem, levels, "queries")
    keys = queries if problem.cached is None else _tree(problem, levels, "keys")
    return (
        Block((b.input("q", q),) if counts[0] else (), (q,), queries, (0, shape.heads)),
        Block((b.input("k", kv), b.input("v", kv)) if counts[1] else (), (kv, kv), keys, (0, shape.kv_heads)),
    )


def _axes(
    problem: AttentionProblem, levels: tuple[Level, ...], choices: tuple[Choice, ...], rank: int
) -> list[tuple[Axis, Choice]]:
    """The axis and the strategy of every level, from the outside in."""
    made = []
    for n, (_, axes) in enumerate(levels):
        here = coordinates(problem.mesh, rank)
        ranks = []
        for places in product(*(range(problem.mesh[i]) for i in axes)):
            there = list(here)
            for i, place in zip(axes, places, strict=True):
                there[i] = place
            ranks.append(_rank(problem.mesh, there))
        prefix = f"axis{axes[0]}." if len(levels) > 1 else ""
        made.append((Axis(tuple(ranks), _place(problem.mesh, axes, rank), prefix), choices[levels[n][1][0]]))
    return made


@lru_cache(maxsize=64)
def _tree(problem: AttentionProblem, levels: tuple[Level, ...], which: Literal["queries", "keys"]) -> Tree:
    """Tokens of every rank, as a tree over the levels; the same object for all ranks."""
    mesh, tokens = problem.mesh, problem.queries if which == "queries" else problem.keys

    def grow(depth: int, fixed: dict[int, int]) -> Tree:
        if depth == len(levels):
            return tokens(_rank(mesh, [fixed[i] for i in range(len(mesh))]))
        axes = levels[depth][1]
        spots = product(*(range(mesh[i]) for i in axes))
        return Branches(grow(depth + 1, {**fixed, **dict(zip(axes, spot, strict=True))}) for spot in spots)

    return grow(0, {})


def coordinates(mesh: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Places of a rank along the axes of a mesh that is numbered row by row."""
    places = []
    for size in reversed(mesh):
        rank, place = divmod(rank, size)
        places.append(place)
    return tuple(reversed(places))


def _rank(mesh: tuple[int, ...], places: list[int]) -> int:
    rank = 0
    for size, place in zip(mesh, places, strict=True):
        rank = rank * size + place
    return rank


def _place(mesh: tuple[int, ...], axes: tuple[int, ...], rank: int) -> int:
    """Place of a rank along several mesh axes taken as one."""
    here = coordinates(mesh, rank)
    return _rank(tuple(mesh[i] for i in axes), [here[i] for i in axes])
