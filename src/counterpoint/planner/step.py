"""How long will a training step take, and what will it need? Its schedule is executed with a virtual clock.

Layers that are alike take the same time, and so do sequences that follow each other; of a deep model a few layers are
simulated and the others counted by what one more of them adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

from counterpoint.cluster.cluster import Cluster
from counterpoint.schedule.timeline import Timeline
from counterpoint.simulator.cost import Costs, KernelCosts
from counterpoint.simulator.fold import fold
from counterpoint.simulator.simulate import simulate
from counterpoint.strategies.memory.policy import LayerPolicy
from counterpoint.strategies.step import TrainStep, step_schedule

SHOWN_LAYERS = 8  # models up to this depth are simulated as they are
FEW = 3  # layers of each kind that are simulated of deeper ones
SHOWN_SEQUENCES = 2
LINEAR = "linear_attention"


@dataclass(frozen=True)
class StepPrediction:
    """What a step takes and needs.

    seconds: of the whole step. exposed_seconds: communication during which a rank computes nothing, mean over ranks.
    peak_bytes: on the fullest rank, state and activations. state_bytes: parameters and moments of a rank, which are
    there between steps. flops: of the model on one rank, without what is computed twice. phases: seconds of every
    phase, mean over ranks; they add up to the step. timeline: of `layers` of the layers and `sequences` of the
    sequences.
    """

    step: TrainStep
    cluster: str
    seconds: float
    exposed_seconds: float
    peak_bytes: int
    state_bytes: int
    flops: float
    phases: dict[str, float]
    timeline: Timeline
    layers: int
    sequences: int

    @property
    def tokens_per_second(self) -> float:
        return self.step.tokens_per_step / self.seconds

    @property
    def whole(self) -> bool:
        """The timeline shows the whole step."""
        return self.layers == self.step.model.num_hidden_layers and self.sequences == self.step.sequences

    def to_json(self) -> dict[str, Any]:
        return {
            "cluster": self.cluster,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "exposed_seconds": self.exposed_seconds,
            "peak_bytes": self.peak_bytes,
            "state_bytes": self.state_bytes,
            "flops_per_second": self.flops / self.seconds,
            "phases": self.phases,
        }


def predict_step(
    step: TrainStep,
    cluster: Cluster,
    *,
    costs: Costs = KernelCosts,
    progress: Callable[[int, int], None] | None = None,
) -> StepPrediction:
    """Simulate a training step on a cluster.

    costs: of kernels on a device, where they were measured rather than described. progress: called with (simulations
    done, simulations in all). Raises ValueError when the cluster has too few ranks, lacks a rate for the dtype, or a
    rank's memory does not hold what the step needs.
    """
    shown, variations = _fewer_layers(step)
    counts = [min(step.sequences, SHOWN_SEQUENCES)]
    if step.sequences > SHOWN_SEQUENCES:
        counts.append(SHOWN_SEQUENCES + 1)
    variants = [
        [replace(v, sequences=n) for v in (shown, *(one.step for one in variations))] for n in counts
    ]  # by sequences, then by layers
    found: list[list[_Figures]] = []
    timeline, total = Timeline(), len(counts) * len(variants[0])
    for row in variants:
        found.append([])
        for variant in row:
            if progress:
                progress(sum(map(len, found)), total)
            made = _simulate(variant, cluster, costs)
            found[-1].append(_Figures.of(made))
            timeline = timeline if timeline.spans else made
    deep = [_deepened(row, variations) for row in found]
    whole = deep[0]
    if len(deep) > 1:
        whole = whole.plus(deep[1], deep[0], step.sequences - SHOWN_SEQUENCES)
    peak = round(whole.peak_bytes)
    room = min(cluster.device(rank).memory_bytes for rank in range(step.world_size))
    if peak > room:
        raise ValueError(
            f"a rank needs {peak / 1e9:.4g} GB at its peak, but the smallest memory of {cluster.name} is "
            f"{room / 1e9:.4g} GB; use more ranks, shorter sequences or another model"
        )
    model = step.model
    rank_tokens = step.tokens_per_step / step.world_size
    flops = model.flops_per_token(step.tokens) * rank_tokens
    state = 12 * -(-model.parameters() // step.world_size)
    return StepPrediction(
        step, cluster.name, whole.seconds, whole.exposed_seconds, peak, state, flops, whole.phases, timeline,
        shown.model.num_hidden_layers, counts[0],
    )  # fmt: skip


def phase_seconds(timeline: Timeline) -> dict[str, float]:
    """Seconds of every phase, mean over ranks; they add up to what a rank was busy or waited.

    A rank's time is dealt out along its computations: from the end of one to the end of the next belongs to the
    phase of the next, except that waiting for a message belongs to the phase of that message.
    """
    sums: dict[str, float] = {}
    ranks = timeline.ranks
    for rank in ranks:
        spans = [s for s in timeline.spans if s.rank == rank and s.phase]
        computing = sorted((s for s in spans if s.kind == "compute"), key=lambda s: (s.start, s.stop))
        arrivals = sorted(
            (s.stop, s.start, s.phase) for s in spans if s.kind in ("recv", "collective", "copy")
        )
        now, at = min((s.start for s in spans), default=0.0), 0
        for s in computing:
            if s.stop <= now:
                continue
            awaited = None
            while at < len(arrivals) and arrivals[at][0] <= s.start:
                if arrivals[at][0] > now:
                    awaited = arrivals[at]
                at += 1
            if awaited and s.start > now:
                sums[awaited[2]] = sums.get(awaited[2], 0.0) + awaited[0] - now
                now = awaited[0]
            sums[s.phase] = sums.get(s.phase, 0.0) + s.stop - now
            now = s.stop
    return {phase: seconds / len(ranks) for phase, seconds in sums.items()}


# ---- helpers -----------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Figures:
    seconds: float
    exposed_seconds: float
    peak_bytes: float
    phases: dict[str, float]

    @classmethod
    def of(cls, timeline: Timeline) -> _Figures:
        ranks = timeline.ranks
        exposed = sum(timeline.categories(rank)["exposed"] for rank in ranks) / len(ranks)
        peak = max(timeline.peak_bytes(rank) for rank in ranks)
        return cls(timeline.seconds, exposed, peak, phase_seconds(timeline))

    def plus(self, other: _Figures, less: _Figures, times: int) -> _Figures:
        """These figures and `times` what lies between `less` and `other`."""

        def more(a: float, b: float, c: float) -> float:
            return max(0.0, a + times * (b - c))

        names = dict.fromkeys([*self.phases, *other.phases])
        phases = {
            n: more(self.phases.get(n, 0.0), other.phases.get(n, 0.0), less.phases.get(n, 0.0)) for n in names
        }
        return _Figures(
            more(self.seconds, other.seconds, less.seconds),
            more(self.exposed_seconds, other.exposed_seconds, less.exposed_seconds),
            more(self.peak_bytes, other.peak_bytes, less.peak_bytes),
            phases,
        )


@dataclass(frozen=True, slots=True)
class _Variation:
    """A step with one layer more of a kind, or one change of layout more, and how many of that are missing."""

    step: TrainStep
    times: int
    peak: bool = True  # whether it tells how the peak grows


def _deepened(row: Sequence[_Figures], variations: Sequence[_Variation]) -> _Figures:
    """Figures of a shallow model, with so many times what each variation adds."""
    deep = row[0]
    for figures, one in zip(row[1:], variations, strict=True):
        peak = figures.peak_bytes if one.peak else row[0].peak_bytes
        deep = deep.plus(replace(figures, peak_bytes=peak), row[0], one.times)
    return deep


_Kind = tuple[str, LayerPolicy]  # type of a layer ("": all are alike) and its policy


def _fewer_layers(step: TrainStep) -> tuple[TrainStep, list[_Variation]]:
    """A step shallow enough to simulate, and what is missing of it."""
    model = step.model
    if model.num_hidden_layers <= SHOWN_LAYERS:
        return step, []
    kinds: dict[_Kind, int] = {}
    for i in model.layers:
        kind = (
            model.layer_types[i] if model.layer_types else "",
            step.memory.layer(i, model.num_hidden_layers),
        )
        kinds[kind] = kinds.get(kind, 0) + 1
    counts = {kind: min(FEW, n) for kind, n in kinds.items()}
    shown = _ordered(counts)
    if len(shown) == model.num_hidden_layers:
        return step, []
    more = [
        _Variation(_with_layers(step, _ordered({**counts, kind: counts[kind] + 1})), n - counts[kind])
        for kind, n in kinds.items()
        if n > counts[kind]
    ]
    moves = _changes([model.is_linear(i) for i in model.layers])
    if moves > 1 and step.sequence_size > 1:
        # the first layer goes to the other end, or the last one, whichever leaves others of its kind behind
        turned = shown[1:] + shown[:1] if shown[0][0] == shown[1][0] else shown[-1:] + shown[:-1]
        more.append(_Variation(_with_layers(step, turned), moves - 1, peak=False))
    return _with_layers(step, shown), more


def _ordered(counts: Mapping[_Kind, int]) -> list[_Kind]:
    """Linear layers first, so that hidden states change their layout once."""
    layers = [kind for kind, n in counts.items() for _ in range(n)]
    return sorted(layers, key=lambda kind: kind[0] != LINEAR)


def _changes(linear: Sequence[bool]) -> int:
    return sum(a != b for a, b in pairwise(linear))


def _with_layers(step: TrainStep, layers: Sequence[_Kind]) -> TrainStep:
    if len(layers) == step.model.num_hidden_layers:
        return step
    types = tuple(kind for kind, _ in layers) if step.model.layer_types else ()
    model = replace(step.model, num_hidden_layers=len(layers), layer_types=types)
    memory = replace(step.memory, layers=tuple(policy for _, policy in layers))
    return replace(step, model=model, memory=memory)


def _simulate(step: TrainStep, cluster: Cluster, costs: Costs) -> Timeline:
    mesh = (step.data, *step.mesh)
    schedules, symmetry = fold(partial(step_schedule, step), mesh)
    timeline = simulate(schedules, cluster, symmetry=symmetry, costs=costs)
    # views that only order steps are no work
    timeline.spans = [s for s in timeline.spans if not (s.kind == "compute" and s.start == s.stop)]
    timeline.meta |= {"sequence_length": step.tokens, "data": step.data, "sequence": list(step.mesh)}
    return timeline
