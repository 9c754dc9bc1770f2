"""Which memory policy for this model and sequence on this device? Peaks are counted, times simulated, the fastest wins.

Every rank trains on sequences of its own. A policy that needs more than the budget is left out; of those that fit the
fastest wins. A few layers may keep all while the others recompute, stream or offload: as many as fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any, Literal

from counterpoint.cluster.cluster import Cluster
from counterpoint.model.config import ModelConfig
from counterpoint.schedule.timeline import Timeline
from counterpoint.simulator.fold import fold
from counterpoint.simulator.simulate import simulate
from counterpoint.strategies.memory.cost import Block, Norm, saved_tensors, total
from counterpoint.strategies.memory.footprint import Footprint, footprint
from counterpoint.strategies.memory.layer import Recipe
from counterpoint.strategies.memory.layers import forward_schedule
from counterpoint.strategies.memory.policy import LayerPolicy, MemoryPolicy
from counterpoint.strategies.memory.sharding import Training
from counterpoint.strategies.memory.step import Step, step_schedule

Objective = Literal["sft", "dpo", "grpo"]
LONGEST = 1 << 27  # tokens; no device comes near
MOST = 64  # chunks of a sequence; longer sequences have longer chunks
KEEP = LayerPolicy("keep")


@dataclass(frozen=True, slots=True)
class Question:
    """What is trained where.

    tokens: of a sequence. batch: sequences of a rank (pairs for DPO, groups of `group` for GRPO). budget: bytes of a
    rank's device, None for all it has. chunk: tokens that a streamed layer works on at a time when the longest sequence
    is sought. head_tokens: tokens whose logits exist at a time, None for all.
    """

    config: ModelConfig
    cluster: Cluster
    tokens: int
    batch: int = 1
    dtype: str = "bfloat16"
    norm: Norm = "fused"
    training: Training = field(default_factory=Training)
    objective: Objective = "sft"
    group: int = 8
    budget: int | None = None
    chunk: int = 2048
    head_tokens: int | None = 1024

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.batch < 1 or self.group < 1 or self.chunk < 1:
            raise ValueError("tokens, batch, group and chunk must be at least 1")
        if self.training.ranks > self.cluster.world_size:
            raise ValueError(
                f"{self.training.ranks} ranks were asked for, but cluster {self.cluster.name} has "
                f"{self.cluster.world_size}"
            )
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"a budget of {self.budget} bytes holds nothing")

    @property
    def limit(self) -> int:
        """Bytes that a step may take on a rank."""
        return self.cluster.device(0).memory_bytes if self.budget is None else self.budget

    @property
    def has_host(self) -> bool:
        return any(tier.name == "host" for tier in self.cluster.device(0).memory)

    def holds(self, peak: Footprint) -> bool:
        """Whether a step with this peak fits, in device memory and in what it offloads to."""
        host = self.cluster.device(0).tier("host").size_bytes if peak.host else 0
        return peak.total <= self.limit and peak.host <= host

    def step(
        self, policy: MemoryPolicy, tokens: int | None = None, layers: Sequence[int] | None = None
    ) -> Step:
        """The step of a rank, over other tokens or with these of the model's layers if given."""
        sequences = self.batch * {"sft": 1, "dpo": 2, "grpo": self.group}[self.objective]
        config = self.config if layers is None else some_layers(self.config, layers)
        block = Block(config, sequences, tokens or self.tokens, self.dtype, self.norm)
        training = replace(self.training, reference=self.objective != "sft")
        return Step(block, policy, training)

    @property
    def kinds(self) -> dict[tuple[bool, int | None], list[int]]:
        """The layers that are alike: (whether they attend linearly, their window) and which they are."""
        found: dict[tuple[bool, int | None], list[int]] = {}
        for i in self.config.layers:
            found.setdefault((self.config.is_linear(i), self.config.window(i)), []).append(i)
        return found


@dataclass(frozen=True, slots=True)
class Answer:
    """A policy: its peak, its predicted time of a step (s; 0 when it does not fit), and whether it fits."""

    name: str
    policy: MemoryPolicy
    peak: Footprint
    seconds: float
    fits: bool

    def to_json(self) -> dict[str, Any]:
        layers = [str(layer) for layer in self.policy.layers]
        return {
            "policy": self.name, "layers": layers, "mlp_tiles": self.policy.mlp_tiles,
            "head_tokens": self.policy.head_tokens, "fits": self.fits, "seconds": self.seconds or None,
            "memory": self.peak.to_json(),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Answers, those that fit first and by time; the longest sequence per policy; what could not be tried, and why."""

    answers: tuple[Answer, ...]
    longest: dict[str, int]
    refused: tuple[tuple[str, str], ...]
    reason: str

    @property
    def best(self) -> Answer | None:
        return self.answers[0] if self.answers and self.answers[0].fits else None


def plan_memory(question: Question, progress: Callable[[str], None] | None = None) -> MemoryPlan:
    """The cheapest policy that fits, all others, and the longest sequence under each.

    progress: called with what is being looked at. Raises ValueError when parameters and states alone do not fit, or
    the sequence fits under no policy, saying what would.
    """
    say = progress or (lambda what: None)
    longest = {}
    for name, policy_of in _families(question):
        say(f"longest sequence: {name}")
        longest[name] = longest_tokens(question, policy_of)
    if not any(longest.values()):
        least = footprint(question.step(_uniform(question, LayerPolicy("recompute")), 1))
        raise ValueError(
            f"not even one token fits in {_gb(question.limit)}: parameters take {_gb(least.parameters)}, optimizer "
            f"states {_gb(least.optimizer)}, gradients {_gb(least.gradients)}; shard over more ranks (--ranks, "
            "--zero), train adapters (--train lora), or take a larger device"
        )
    refused = (
        [] if question.has_host else [("offload", f"{question.cluster.device(0).name} has no host memory")]
    )
    answers: list[Answer] = []
    for name, policy in _candidates(question):
        say(f"peak: {name}")
        peak = footprint(question.step(policy))
        answers.append(Answer(name, policy, peak, 0.0, question.holds(peak)))
    if not any(a.fits for a in answers):
        least_answer = min(answers, key=lambda a: a.peak.total)
        family = max(longest, key=lambda name: longest[name])
        raise ValueError(
            f"{question.tokens:,} tokens do not fit in {_gb(question.limit)} under any policy: {least_answer.name} "
            f"takes least, {_gb(least_answer.peak.total)}; {longest[family]:,} tokens would fit ({family}). Shorten "
            "the sequence, share it over ranks, shard the states (--zero) or train adapters (--train lora)"
        )
    clock = StepClock(question)
    timed = []
    for answer in answers:
        say(f"time: {answer.name}")
        timed.append(replace(answer, seconds=clock.seconds(answer.policy) if answer.fits else 0.0))
    timed.sort(key=lambda a: (not a.fits, a.seconds if a.fits else a.peak.total))
    return MemoryPlan(tuple(timed), longest, tuple(refused), _reason(question, timed))


def longest_tokens(question: Question, policy_of: Callable[[int], MemoryPolicy]) -> int:
    """Tokens of the longest sequence whose step stays within the limit; 0 when none does."""

    def fits(tokens: int) -> bool:
        return question.holds(footprint(question.step(policy_of(tokens), tokens)))

    low, high = 0, 1024
    while high < LONGEST and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class StepClock:
    """Predicted times of steps: simulated with few layers, each further layer of its type and policy adds what one adds
    there."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self._known: dict[tuple[int, MemoryPolicy], tuple[float, float]] = {}

    def seconds(self, policy: MemoryPolicy) -> float:
        """Seconds of a step of the whole model."""
        layers = self.question.config.num_hidden_layers
        counts: Counter[tuple[int, LayerPolicy]] = Counter()
        for alike in self.question.kinds.values():
            counts.update((alike[0], policy.layer(i, layers)) for i in alike)
        parts = {key: self._affine(key[0], replace(policy, layers=(key[1],))) for key in counts}
        fixed = max(base for base, _ in parts.values())
        return fixed + sum(counts[key] * each for key, (_, each) in parts.items())

    def _affine(self, kind: int, policy: MemoryPolicy) -> tuple[float, float]:
        """(what the step takes beside layers, what every layer takes) of layers like this one under one policy."""
        if (kind, policy) not in self._known:
            few, more = 3, 4
            seconds = [timeline(self.question, policy, layers=(kind,) * n).seconds for n in (few, more)]
            each = seconds[1] - seconds[0]
            self._known[kind, policy] = seconds[0] - few * each, each
        return self._known[kind, policy]


def timeline(
    question: Question,
    policy: MemoryPolicy,
    tokens: int | None = None,
    layers: Sequence[int] | None = None,
) -> Timeline:
    """The simulated timeline of a step, without a limit of memory."""
    step = question.step(policy, tokens, layers)
    ranks = question.training.ranks
    schedules, symmetry = fold(partial(step_schedule, step), (ranks,))
    return simulate(schedules, roomy(question.cluster.subset(ranks)), symmetry=symmetry)


def offload_ratio(question: Question, tokens: int | None = None) -> float:
    """r = min(1, T B / A): what a layer's forward pass of T seconds can copy to the host at B bytes/s of its A kept
    bytes (ByteScale, arXiv 2502.21231, section 4.2), of the layers where that is least. Raises ValueError when the
    device has no host memory."""
    bandwidth = question.cluster.device(0).tier("host").attained.maximum
    block, place = question.step(MemoryPolicy(), tokens).block, roomy(question.cluster.subset(1))
    ratios = []
    for kind in (alike[0] for alike in question.kinds.values()):
        recipe = Recipe(block.at(kind), KEEP, 1, question.training.rank)
        seconds = simulate([forward_schedule(recipe, kind)], place).seconds
        ratios.append(seconds * bandwidth / total(saved_tensors(recipe.block)))
    return min(1.0, *ratios)


def some_layers(config: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """The model with so many layers, each like the one of this number."""
    kinds = tuple(config.layer_types[i] for i in layers) if config.layer_types else ()
    changes: dict[str, Any] = {"num_hidden_layers": len(layers), "layer_types": kinds}
    if config.linear is not None and "linear_attention" not in kinds:
        changes |= {"linear": None, "model_type": "llama"}
    return replace(config, **changes)


def first_layers(config: ModelConfig, layers: int) -> ModelConfig:
    """The same model with its first layers only (repeated when there are not so many)."""
    return some_layers(config, [i % config.num_hidden_layers for i in range(layers)])


def roomy(cluster: Cluster) -> Cluster:
    """The same cluster with devices whose memory never runs out."""
    devices = {
        name: replace(d, memory=(replace(d.memory[0], size_bytes=1 << 60), *d.memory[1:]))
        for name, d in cluster.devices.items()
    }
    return replace(cluster, devices=devices)


# ---- what is tried -----------------------------------------------------------------------------------------------
def _uniform(question: Question, layer: LayerPolicy, mlp_tiles: int = 1) -> MemoryPolicy:
    """One policy for all layers; linear attention layers recompute where the others stream."""
    if layer.kind == "stream" and question.config.linear is not None:
        config = question.config
        layers = tuple(_of_layer(config, layer, i) for i in config.layers)
        return MemoryPolicy(layers, mlp_tiles, question.head_tokens)
    return MemoryPolicy((layer,), mlp_tiles, question.head_tokens)


def _of_layer(config: ModelConfig, policy: LayerPolicy, layer: int) -> LayerPolicy:
    return LayerPolicy("recompute") if policy.kind == "stream" and config.is_linear(layer) else policy


def _families(question: Question) -> Iterator[tuple[str, Callable[[int], MemoryPolicy]]]:
    """Policies of which the longest sequence is sought, as functions of the sequence's length."""
    yield "keep", lambda tokens: _uniform(question, KEEP)
    if question.has_host:
        yield "offload", lambda tokens: _uniform(question, _offload(question, tokens))
    yield "recompute", lambda tokens: _uniform(question, LayerPolicy("recompute"))
    yield (
        f"stream, chunks of {question.chunk}",
        lambda tokens: _uniform(question, LayerPolicy("stream", min(MOST, -(-tokens // question.chunk)))),
    )


def _candidates(question: Question) -> Iterator[tuple[str, MemoryPolicy]]:
    """Policies for the tokens asked for; mixtures keep all of as many layers as fit beside the others."""
    finest = min(MOST, -(-question.tokens // question.chunk))
    streams = sorted({n for n in (2, 4, 8, 16, finest) if n <= question.tokens})
    singles = [KEEP, LayerPolicy("recompute"), *(LayerPolicy("stream", n) for n in streams)]
    fast = [KEEP]
    if question.has_host:
        fast.append(_offload(question, question.tokens))
        singles.append(fast[1])
    for layer in singles:
        yield _name(question, layer), _uniform(question, layer)
    yield "keep, MLP in 4 tiles", _uniform(question, KEEP, 4)
    yield "recompute, MLP in 4 tiles", _uniform(question, LayerPolicy("recompute"), 4)
    for quick, small in product(fast, singles[1:]):
        mixed = _mixture(question, quick, small)
        if mixed is not None:
            count = mixed.layers.count(quick)
            yield f"{count} {quick} + {len(mixed.layers) - count} {_name(question, small)}", mixed


def _name(question: Question, layer: LayerPolicy) -> str:
    beside = layer.kind == "stream" and question.config.linear is not None
    return f"{layer}{' (linear layers recompute)' if beside else ''}"


def _offload(question: Question, tokens: int) -> LayerPolicy:
    """Offloading as much as can be hidden, rounded down to a thousandth."""
    return LayerPolicy("offload", ratio=int(1000 * offload_ratio(question, tokens)) / 1000)


def _mixture(question: Question, quick: LayerPolicy, small: LayerPolicy) -> MemoryPolicy | None:
    """As many of the last layers as fit under the quick policy, the others under the small one; None for no mixture."""
    layers = question.config.num_hidden_layers
    if quick.kind == small.kind:
        return None

    below = _uniform(question, small)

    def mixed(kept: int) -> MemoryPolicy:
        rest = tuple(below.layer(i, layers) for i in range(layers - kept))
        return MemoryPolicy(rest + (quick,) * kept, 1, question.head_tokens)

    def fits(kept: int) -> bool:
        return question.holds(footprint(question.step(mixed(kept))))

    low, high = 0, layers
    if fits(layers) or not fits(0):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return mixed(low) if low else None


def _reason(question: Question, answers: list[Answer]) -> str:
    best, fitting = answers[0], [a for a in answers if a.fits]
    peak = best.peak
    lines = [
        f"{best.name} is the fastest of {len(fitting)} policies that fit in {_gb(question.limit)}: "
        f"{best.seconds:.3g} s a step, {_gb(peak.total)} at the {peak.where}"
    ]
    if best.name != "keep":
        keep = next(a for a in answers if a.name == "keep")
        lines.append(f"keep would take {_gb(keep.peak.total)}, most of it kept activations")
    others = [a for a in fitting if a is not best]
    if others:
        least = min(others, key=lambda a: a.peak.total)
        lines.append(
            f"{least.name} takes least, {_gb(least.peak.total)}, and {least.seconds / best.seconds - 1:+.1%} time"
        )
    return "\n".join(lines)


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.1f} GB"
