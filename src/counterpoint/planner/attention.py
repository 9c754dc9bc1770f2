"""Which strategy for the attention of this model on this cluster? Every one is simulated, and the fastest wins.

Nothing is decided by rule: the schedules that would run are executed with a virtual clock on the cluster, forward and
backward separately, flat and nested over two axes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

from counterpoint.cluster.cluster import Cluster
from counterpoint.schedule.schedule import Schedule
from counterpoint.schedule.timeline import Timeline
from counterpoint.simulator.fold import fold
from counterpoint.simulator.simulate import simulate
from counterpoint.strategies.sequence.attention import (
    STRATEGIES,
    AttentionProblem,
    backward_schedule,
    forward_schedule,
    parse_choices,
)
from counterpoint.strategies.sequence.blocks import AttentionShape
from counterpoint.strategies.sequence.layout import SequenceLayout

Pass = Literal["forward", "backward"]
Phase = Literal["train", "prefill"]

TIE = 1.01  # answers this close to the fastest are as good; of those the simplest comes first

# Options worth trying beside the defaults of every strategy.
VARIANTS = ("tokenring(packets=4)", "tokenring(relay=False)")


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be attended, and where.

    tokens: new tokens over all ranks. cached: tokens whose keys and values already lie on the ranks. window: sliding
    window in tokens, or None. layouts: those to try; empty: what suits the mask.
    """

    shape: AttentionShape
    cluster: Cluster
    ranks: int
    tokens: int
    cached: int = 0
    causal: bool = True
    window: int | None = None
    phase: Phase = "train"
    layouts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.ranks <= self.cluster.world_size:
            raise ValueError(
                f"{self.ranks} ranks were asked for, but cluster {self.cluster.name} has 1 to {self.cluster.world_size}"
            )
        if self.tokens < self.ranks:
            raise ValueError(
                f"{self.tokens} tokens do not reach {self.ranks} ranks; give at least one token a rank"
            )
        if self.cached < 0:
            raise ValueError(f"cached is {self.cached}; give a number of tokens of at least 0")
        if self.cached and self.phase == "train":
            raise ValueError("a cache goes with phase prefill; training attends new tokens only")


@dataclass(frozen=True, slots=True)
class Estimate:
    """One pass of one strategy, simulated.

    seconds: until the last rank is done. exposed_seconds: communication during which a rank computes nothing, mean
    over ranks. sent_bytes: what the busiest rank sends. link_bytes: the most on any directed pair of ranks.
    peak_bytes: live values on the fullest rank. error: why it cannot run (then everything else is 0).
    """

    strategies: tuple[str, ...]
    seconds: float = 0.0
    compute_seconds: float = 0.0
    exposed_seconds: float = 0.0
    sent_bytes: int = 0
    link_bytes: int = 0
    peak_bytes: int = 0
    error: str = ""

    @property
    def name(self) -> str:
        return "/".join(self.strategies)


@dataclass(frozen=True, slots=True)
class Answer:
    """A forward and, for training, a backward strategy on a mesh, with what each costs."""

    mesh: tuple[int, ...]
    layout: str
    forward: Estimate
    backward: Estimate | None

    @property
    def seconds(self) -> float:
        return self.forward.seconds + (self.backward.seconds if self.backward else 0.0)

    @property
    def exposed_seconds(self) -> float:
        return self.forward.exposed_seconds + (self.backward.exposed_seconds if self.backward else 0.0)

    @property
    def peak_bytes(self) -> int:
        return max(self.forward.peak_bytes, self.backward.peak_bytes if self.backward else 0)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": self.seconds, "exposed_seconds": self.exposed_seconds}


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """All answers, what could not run with the reason, and why the first answer wins.

    The first answer is the simplest of those within a percent of the fastest; the others follow by time.
    """

    answers: tuple[Answer, ...]
    refused: tuple[tuple[str, str], ...]
    reason: str


def plan_attention(question: Question, progress: Callable[[int, int], None] | None = None) -> AttentionPlan:
    """Simulate every strategy and composition, forward and backward, and rank what fits.

    progress: called with (simulations done, simulations in all). Raises ValueError when nothing can run.
    """
    places = [(m, l, s) for m, l in _places(question) for s in _strategies(len(m))]
    passes: tuple[Pass, ...] = ("forward", "backward") if question.phase == "train" else ("forward",)
    found: dict[tuple[tuple[int, ...], str, Pass], list[Estimate]] = {}
    refused: dict[str, str] = {}
    for done, ((mesh, layout, strategies), which) in enumerate(product(places, passes)):
        if progress:
            progress(done, len(places) * len(passes))
        result = estimate(question, mesh, layout, strategies, which)
        if result.error:
            refused.setdefault(f"{result.name} {which} on {'x'.join(map(str, mesh))}", result.error)
        else:
            found.setdefault((mesh, layout, which), []).append(result)
    answers = []
    for mesh, layout in dict.fromkeys((m, l) for m, l, _ in places):
        forwards = found.get((mesh, layout, "forward"), [])
        backwards = found.get((mesh, layout, "backward"), []) if question.phase == "train" else [None]
        answers += [Answer(mesh, layout, f, b) for f, b in product(forwards, backwards) if _compatible(f, b)]
    if not answers:
        why = next(iter(refused.items()))
        raise ValueError(f"no strategy can run: {why[0]}: {why[1]}")
    answers.sort(key=lambda a: a.seconds)
    fast = [a for a in answers if a.seconds <= TIE * answers[0].seconds]
    simplest = min(fast, key=lambda a: (len(a.mesh), a.forward != a.backward, a.seconds))
    answers.insert(0, answers.pop(answers.index(simplest)))
    return AttentionPlan(tuple(answers), tuple(refused.items()), _reason(answers))


def estimate(
    question: Question, mesh: tuple[int, ...], layout: str, strategies: Sequence[str], which: Pass
) -> Estimate:
    """One pass of one strategy on the question's cluster."""
    names = tuple(strategies)
    try:
        timeline = predict(question, mesh, layout, names, which)
    except ValueError as error:
        return Estimate(names, error=str(error))
    return measured(names, timeline)


def measured(names: tuple[str, ...], timeline: Timeline) -> Estimate:
    """What a simulated pass costs."""
    parts = timeline.split()
    shares = [part.categories(rank) for rank, part in parts.items()]
    links = timeline.bytes_by_link()
    sent: dict[int, int] = defaultdict(int)
    for (source, _), nbytes in links.items():
        sent[source] += nbytes
    return Estimate(
        names,
        timeline.seconds,
        sum(s["compute"] for s in shares) / len(parts),
        sum(s["exposed"] for s in shares) / len(parts),
        max(sent.values(), default=0),
        max(links.values(), default=0),
        max(part.peak_bytes(rank) for rank, part in parts.items()),
    )


def predict(
    question: Question, mesh: tuple[int, ...], layout: str, strategies: Sequence[str], which: Pass
) -> Timeline:
    """The simulated timeline of one pass."""
    choices = parse_choices(tuple(strategies))
    cache = SequenceLayout(layout, question.cached, question.ranks) if question.cached else None
    problem = AttentionProblem(
        question.shape,
        SequenceLayout(layout, question.tokens, question.ranks),
        mesh,
        choices,
        choices,
        question.causal,
        question.window,
        cached=cache,
    )
    write: Callable[[AttentionProblem, int], Schedule] = (
        forward_schedule if which == "forward" else backward_schedule
    )
    schedules, symmetry = fold(partial(write, problem), mesh)
    return simulate(schedules, question.cluster, symmetry=symmetry)


def _places(question: Question) -> Iterator[tuple[tuple[int, ...], str]]:
    """Meshes and layouts to try: flat, and split where the cluster's groups are (or anywhere, for few ranks)."""
    layouts = ["zigzag"] if question.causal else ["contiguous"]
    if question.causal and question.window is not None:
        layouts.append("contiguous")  # neighbours then hold what a window needs
    layouts = list(question.layouts) or layouts
    n = question.ranks
    inner = {size for size in question.cluster.sizes if size < n and n % size == 0}
    if n <= 8:
        inner |= {d for d in range(2, n) if n % d == 0}
    meshes = [(n,), *((n // d, d) for d in sorted(inner) if d > 1)]
    yield from product(meshes, layouts)


def _strategies(axes: int) -> list[tuple[str, ...]]:
    if axes == 1:
        return [(name,) for name in (*STRATEGIES, *VARIANTS)]
    names = [name for name in STRATEGIES if name not in ("rsa", "bidirectional_ring")]
    return list(product(names, repeat=axes))


def _compatible(forward: Estimate, backward: Estimate | None) -> bool:
    # A backward pass with Ulysses was simulated with the heads that a Ulysses forward pass leaves behind.
    if backward is None or not any("ulysses" in s for s in backward.strategies):
        return True
    return forward.strategies == backward.strategies


def _reason(answers: list[Answer]) -> str:
    """Why the first answer wins, against the best one whose strategy is another."""
    best = answers[0]
    passes = [("forward", best.forward)] + ([("backward", best.backward)] if best.backward else [])
    lines = []
    for which, chosen in passes:
        assert chosen is not None
        others = {getattr(a, which) for a in answers} - {chosen}
        family = chosen.strategies[0].split("(")[0] if len(chosen.strategies) == 1 else chosen.name
        rivals = [e for e in others if e.name.split("(")[0] != family]
        text = (
            f"{which}: {chosen.name} leaves {_ms(chosen.exposed_seconds)} of communication exposed and sends "
            f"{chosen.sent_bytes / 1e6:,.1f} MB per rank, {chosen.link_bytes / 1e6:,.1f} MB on the busiest pair"
        )
        if rivals:
            rival = min(rivals, key=lambda e: e.seconds)
            behind = rival.seconds - chosen.seconds
            slower = f"{_ms(behind)} slower" if behind > 0 else "no slower by itself"
            text += (
                f"; the best other, {rival.name}, exposes {_ms(rival.exposed_seconds)}, sends "
                f"{rival.sent_bytes / 1e6:,.1f} MB ({rival.link_bytes / 1e6:,.1f} MB) and is {slower}"
            )
        lines.append(text)
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms"
