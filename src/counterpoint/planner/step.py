"""How long will a training step take, and what will it need? Its schedule is executed with a virtual clock.

Layers that are alike take the same time, and so do sequences that follow each other; of a deep model a few layers are
simulated and the others counted by what one more of them adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from counterpoint.cluster.cluster import Cluster
from counterpoint.model.config import ModelConfig
from counterpoint.schedule.timeline import Timeline
from counterpoint.simulator.cost import Costs, KernelCosts
from counterpoint.simulator.fold import fold
from counterpoint.simulator.simulate import simulate
from counterpoint.strategies.step import TrainStep, step_schedule

SHOWN_LAYERS = 8  # models up to this depth are simulated as they are
FEW = 3  # layers of each kind that are simulated of deeper ones
SHOWN_SEQUENCES = 2


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
    shown, layers = _fewer_layers(step)
    counts = [min(step.sequences, SHOWN_SEQUENCES)]
    if step.sequences > SHOWN_SEQUENCES:
        counts.append(SHOWN_SEQUENCES + 1)
    variants = [
        [replace(v, sequences=n) for v in (shown, *(v for v, _ in layers))] for n in counts
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
    deep = [_deepened(row, [times for _, times in layers]) for row in found]
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
        computing = sorted(
            (s for s in spans if s.kind in ("compute", "copy")), key=lambda s: (s.start, s.stop)
        )
        arrivals = sorted((s.stop, s.start, s.phase) for s in spans if s.kind in ("recv", "collective"))
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


def _deepened(row: Sequence[_Figures], times: Sequence[int]) -> _Figures:
    """Figures of a shallow model, with so many times what one layer more of each kind adds."""
    deep = row[0]
    for figures, n in zip(row[1:], times, strict=True):
        deep = deep.plus(figures, row[0], n)
    return deep


def _fewer_layers(step: TrainStep) -> tuple[TrainStep, list[tuple[TrainStep, int]]]:
    """A step shallow enough to simulate, and steps with a layer more of a kind and how many of it are missing."""
    model = step.model
    kinds: dict[int | None, list[int]] = {}
    for layer in model.layers:
        kinds.setdefault(model.window(layer), []).append(layer)
    if model.num_hidden_layers <= SHOWN_LAYERS:
        return step, []
    counts = {kind: min(FEW, len(layers)) for kind, layers in kinds.items()}
    missing = {k: len(layers) - counts[k] for k, layers in kinds.items() if len(layers) > counts[k]}
    longer = [({**counts, kind: counts[kind] + 1}, times) for kind, times in missing.items()]
    more = [(replace(step, model=_with_layers(model, c)), times) for c, times in longer]
    return replace(step, model=_with_layers(model, counts)), more


def _with_layers(model: ModelConfig, counts: dict[int | None, int]) -> ModelConfig:
    total = sum(counts.values())
    if total == model.num_hidden_layers:
        return model
    if not model.layer_types:
        return replace(model, num_hidden_layers=total)
    kinds: list[str] = []
    for window, count in counts.items():
        kinds += ["full_attention" if window is None else "sliding_attention"] * count
    return replace(model, num_hidden_layers=total, layer_types=tuple(kinds))


def _simulate(step: TrainStep, cluster: Cluster, costs: Costs) -> Timeline:
    mesh = (step.data, *step.mesh)
    schedules, symmetry = fold(partial(step_schedule, step), mesh)
    timeline = simulate(schedules, cluster, symmetry=symmetry, costs=costs)
    # views that only order steps are no work
    timeline.spans = [s for s in timeline.spans if not (s.kind == "compute" and s.start == s.stop)]
    timeline.meta |= {"sequence_length": step.tokens, "data": step.data, "sequence": list(step.mesh)}
    return timeline
