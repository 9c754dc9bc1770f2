"""What a group of ranks takes for its sequences, as sums over sequences, so that solvers can plan with it.

Nothing is a constant of this file: for every size and place of a group the kernels and messages of the strategy's own
schedule are costed on the cluster (`batch_probe`) for a few loads, and a1 pairs + a2 tokens + b is fitted to them
(FlexSP, arXiv 2412.01523, section 4.1, with visible pairs in place of s^2 so that windows and layer types add up).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import ceil
from typing import Literal

import numpy as np

from counterpoint.cluster.cluster import Cluster
from counterpoint.kernels.kernel import TensorSpec
from counterpoint.model.config import ModelConfig
from counterpoint.planner import batch_probe, layer_work
from counterpoint.planner.batch_probe import GroupStrategy
from counterpoint.planner.layer_work import LayerKind, layer_kinds
from counterpoint.strategies.data.gather import all_gather
from counterpoint.strategies.sequence.blocks import AttentionShape
from counterpoint.strategies.sequence.linear_builder import LinearShape

State = Literal["zero1", "zero3"]
RESERVE = 0.1  # share of the memory left to the library, the allocator and buffers of collectives
SHARES = (1.0, 1 / 8, 1 / 64, 1 / 1024)  # visible pairs, of those that one sequence of all tokens has
LOADS = (1.0, 1 / 3, 1 / 12)  # tokens a rank, as shares of what it can hold


@dataclass(frozen=True, slots=True)
class Linear:
    """pairs, tokens -> seconds: `pair` a visible pair (of the whole group), `token` a token, `fixed` in any case."""

    pair: float = 0.0
    token: float = 0.0
    fixed: float = 0.0

    def __add__(self, other: Linear) -> Linear:
        return Linear(self.pair + other.pair, self.token + other.token, self.fixed + other.fixed)

    def times(self, factor: float) -> Linear:
        return Linear(factor * self.pair, factor * self.token, factor * self.fixed)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """A layer of a group, forward and backward. time = compute + exposed + max(0, travelling - hiding).

    exposed: messages that computing never hides. travelling: messages under way while blocks are attended, which takes
    `hiding`.
    """

    compute: Linear
    exposed: Linear = Linear()
    travelling: Linear = Linear()
    hiding: Linear = Linear()


@dataclass(frozen=True)
class GroupCost:
    """Costs of a group of `size` ranks, forward and backward: sums over layers of every kind, and over sequences.

    by_kind: (kind, how many layers, cost of one). rest: embedding, head, loss.
    """

    size: int
    strategy: GroupStrategy
    by_kind: tuple[tuple[LayerKind, int, LayerCost], ...]
    rest: Linear

    def compute(self, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
        """Seconds of computing that every sequence adds; `fixed` comes once."""
        s = np.asarray(lengths, dtype=np.float64)
        return self._sum(s, lambda c: c.compute) + self.rest.token * s

    def exposed(self, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
        """Seconds of messages that every sequence adds and nothing hides."""
        return self._sum(np.asarray(lengths, dtype=np.float64), lambda c: c.exposed)

    def travelling(self, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
        """Seconds that every sequence adds to messages beyond what its computing hides; may be negative.

        Only a positive sum over all sequences, with its fixed part, takes time.
        """
        s = np.asarray(lengths, dtype=np.float64)
        return self._sum(s, lambda c: c.travelling) - self._sum(s, lambda c: c.hiding)

    @cached_property
    def fixed(self) -> tuple[float, float, float]:
        """What (compute, exposed, travelling) of a group begin with."""
        rows = [(count, cost) for _, count, cost in self.by_kind]
        return (
            self.rest.fixed + sum(n * c.compute.fixed for n, c in rows),
            sum(n * c.exposed.fixed for n, c in rows),
            sum(n * (c.travelling.fixed - c.hiding.fixed) for n, c in rows),
        )

    def seconds(self, lengths: Sequence[int] | np.ndarray) -> tuple[float, float]:
        """(computing, exposed communication) of the group with these sequences."""
        s = np.asarray(lengths, dtype=np.float64)
        tokens = float(s.sum())
        compute, exposed, travelling = self.fixed
        compute += self.rest.token * tokens
        for kind, count, cost in self.by_kind:
            pairs = count * float(_pairs(s, kind).sum())
            compute += cost.compute.pair * pairs + count * cost.compute.token * tokens
            exposed += cost.exposed.pair * pairs + count * cost.exposed.token * tokens
            travelling += (cost.travelling.pair - cost.hiding.pair) * pairs
            travelling += count * (cost.travelling.token - cost.hiding.token) * tokens
        return compute, exposed + max(0.0, travelling)

    def _sum(self, s: np.ndarray, part: Callable[[LayerCost], Linear]) -> np.ndarray:
        total = np.zeros_like(s)
        for kind, count, cost in self.by_kind:
            linear = part(cost)
            total += count * (linear.pair * _pairs(s, kind) + linear.token * s)
        return total


@dataclass
class BatchCost:
    """Costs and memory of batches of a model on the first `ranks` ranks of a cluster.

    strategy: how a group shares its sequences; where Ulysses has too few heads the group is a ring. state: "zero3"
    (parameters, gradients and optimizer sharded over all ranks, gathered in every layer: synchronous micro-batches)
    or "zero1" (only the optimizer sharded). recompute: layers keep their input alone and run again. tokens_per_rank:
    most tokens that a rank may hold at a time; default: what its memory takes.
    """

    model: ModelConfig
    cluster: Cluster
    ranks: int
    strategy: GroupStrategy = "ulysses"
    state: State = "zero3"
    recompute: bool = False
    dtype: str = "bfloat16"
    tokens_per_rank: int | None = None
    _groups: dict[tuple, GroupCost] = field(default_factory=dict, repr=False)
    _kernels: dict[tuple, float] = field(default_factory=dict, repr=False)
    _probes: dict[batch_probe.Probe, float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.ranks <= self.cluster.world_size:
            raise ValueError(
                f"{self.ranks} ranks were asked for, but cluster {self.cluster.name} has 1 to {self.cluster.world_size}"
            )
        if self.tokens_per_rank is not None and self.tokens_per_rank < 1:
            raise ValueError(f"tokens_per_rank is {self.tokens_per_rank}; give at least 1")

    # ---- memory --------------------------------------------------------------------------------
    @property
    def synchronous(self) -> bool:
        return self.state == "zero3"

    @cached_property
    def state_bytes(self) -> float:
        """Parameters, gradients (2 bytes each) and Adam's state (12 bytes a parameter) of one rank."""
        whole, n = float(self.model.parameters()), self.ranks
        if self.state == "zero1":
            return 4 * whole + 12 * whole / n
        return 16 * whole / n + 2 * 2 * layer_work.layer_parameters(
            self.model
        )  # this layer's and the next one's

    @cached_property
    def layer_bytes(self) -> float:
        """Bytes that a token keeps in a layer."""
        return layer_work.activation_bytes(self.model, self.dtype, recompute=self.recompute)

    @cached_property
    def token_bytes(self) -> float:
        """Bytes that a token needs at the fullest moment: all layers, and the head."""
        running = (
            layer_work.activation_bytes(self.model, self.dtype, recompute=False) if self.recompute else 0.0
        )
        kept = self.model.num_hidden_layers * self.layer_bytes
        return kept + running + layer_work.head_bytes(self.model, self.dtype)

    @cached_property
    def capacity(self) -> int:
        """Most tokens a rank can hold. Raises ValueError when not even the model's state fits."""
        if self.tokens_per_rank is not None:
            return self.tokens_per_rank
        device = self.cluster.device(0)
        room = (1 - RESERVE) * device.memory_bytes - self.state_bytes
        if room < self.token_bytes:
            raise ValueError(
                f"{self.state_bytes / 1e9:.1f} GB of parameters and optimizer state a rank leave no room for tokens in "
                f"{device.memory_bytes / 1e9:.0f} GB of {device.name}; use more ranks, zero3 or a smaller model"
            )
        return int(room / self.token_bytes)

    def capacity_with(self, offload: float) -> int:
        """Most tokens a rank can hold when it offloads this share of the inner layers' activations."""
        layers = self.model.num_hidden_layers
        kept = self.token_bytes - offload * max(0, layers - 2) * self.layer_bytes
        return int(self.capacity * self.token_bytes / kept)

    def fits(self, length: int) -> bool:
        return length <= self.ranks * self.capacity

    # ---- time ----------------------------------------------------------------------------------
    def offload_seconds(self, tokens: float, offload: float, compute: float) -> float:
        """Seconds by which copies of `tokens` tokens' activations to the host and back outlast computing.

        A forward pass takes about a third of `compute` (s), and hides the way out; the backward pass the way back.
        """
        device = self.cluster.device(0)
        if len(device.memory) < 2:
            raise ValueError(f"device {device.name} has no memory tier to offload to")
        away = offload * tokens * max(0, self.model.num_hidden_layers - 2) * self.layer_bytes
        copy = device.memory[1].attained.seconds(away)
        return max(0.0, copy - compute / 3) + max(0.0, copy - 2 * compute / 3)

    def group(self, ranks: Sequence[int]) -> GroupCost:
        """The cost of a group on these ranks of the cluster."""
        key = self._place(ranks)
        if key not in self._groups:
            self._groups[key] = self._fit(tuple(ranks))
        return self._groups[key]

    def strategy_of(self, size: int) -> GroupStrategy:
        return "ring" if size > self.model.num_attention_heads else self.strategy

    @cached_property
    def shape(self) -> AttentionShape:
        m = self.model
        return AttentionShape(1, m.num_attention_heads, m.num_key_value_heads, m.head_dim, self.dtype)

    @cached_property
    def linear_shape(self) -> LinearShape:
        """Of the linear attention layers, which there must be."""
        m = self.model.linear
        assert m is not None
        decay = "scalar" if m.decay == "retention" else m.decay
        return LinearShape(1, m.num_heads, m.key_head_dim, m.value_head_dim, decay, self.dtype)  # type: ignore[arg-type]

    def _place(self, ranks: Sequence[int]) -> tuple:
        """What two groups have in common that take equally long: size, levels, ranks per node."""
        size = len(ranks)
        if size == 1:
            return (1,)
        tier = self.cluster.tier(ranks)
        if self.strategy_of(size) == "ring":
            return size, tier
        inner = self.cluster.sizes[0]
        counts: dict[int, int] = {}
        for rank in ranks:
            counts[rank // inner] = counts.get(rank // inner, 0) + 1
        return size, tier, *sorted(counts.values())

    def _fit(self, ranks: tuple[int, ...]) -> GroupCost:
        size, device = len(ranks), self.cluster.device(ranks[0])
        loads = sorted({max(1, ceil(share * self.capacity)) for share in LOADS})
        kinds = []
        for kind, count in layer_kinds(self.model).items():
            kinds.append((kind, count, self._fit_layer(kind, ranks, loads)))
        ends = []
        for t in loads:
            work = layer_work.head_operations(self.model, t, self.dtype)
            ends.append(sum(layer_work.seconds(device, work, self.dtype, backward=b) for b in (False, True)))
        token, fixed = _least_squares([[t, 1.0] for t in loads], ends)
        return GroupCost(size, self.strategy_of(size), tuple(kinds), Linear(0.0, token / size, fixed))

    def _fit_layer(self, kind: LayerKind, ranks: tuple[int, ...], loads: list[int]) -> LayerCost:
        """One layer of this kind, forward and backward (and forward again where layers are recomputed)."""
        size, device = len(ranks), self.cluster.device(ranks[0])
        strategy, again = self.strategy_of(size), 1 + self.recompute
        linear = self.linear_shape if kind.type == "linear_attention" else None
        rows, times, attends = [], [], []
        for t in loads:
            work = layer_work.layer_operations(self.model, t, self.dtype, kind)
            forward, backward = (
                layer_work.seconds(device, work, self.dtype, backward=b) for b in (False, True)
            )
            for share in SHARES[:1] if linear else SHARES:
                if linear:
                    f, b = batch_probe.linear_compute(linear, size, t, device)
                else:
                    f, b = batch_probe.compute(self.shape, strategy, size, t, share, device, self._kernels)
                whole = t * size
                rows.append([0.0 if linear else share * whole * (whole + 1) / 2, t * size, 1.0])
                times.append(again * (forward + f) + backward + b)
                attends.append(again * f + b)
        if linear:
            compute = Linear(0.0, *_least_squares([row[1:] for row in rows], times))
        else:
            compute = Linear(*_least_squares(rows, times))
        if size == 1:
            return LayerCost(compute)
        if linear:  # states, whose size no sequence changes
            sent = batch_probe.linear_communication(linear, ranks, loads[0], self.cluster)
            return LayerCost(compute, Linear(0.0, 0.0, again * sent[0] + sent[1]))
        ends = [loads[0], loads[-1]]  # messages have no other figure than their size
        passes = batch_probe.communication(
            self.shape, strategy, ranks, ends, self.cluster, again, self._probes
        )
        exposed, travelling = (
            Linear(0.0, *_least_squares([[t * size, 1.0] for t in ends], list(found))) for found in passes
        )
        if strategy == "ulysses":
            return LayerCost(compute, exposed)
        # messages of all steps but one travel while blocks are attended and merged
        hiding = Linear(*_least_squares(rows, attends)).times((size - 1) / size)
        return LayerCost(compute, exposed, travelling, hiding)

    @cached_property
    def state_seconds(self) -> float:
        """Gathering and reducing of state: in every micro-batch with zero3, once a batch with zero1."""
        from counterpoint.simulator.fold import fold
        from counterpoint.simulator.simulate import simulate

        if self.ranks == 1:
            return 0.0
        inner = self.cluster.sizes[0]
        mesh = (self.ranks // inner, inner) if self.ranks % inner == 0 else (self.ranks, 1)
        small = (min(mesh[0], 8), mesh[1])
        n = small[0] * small[1]
        zero3 = self.state == "zero3"
        parameters = layer_work.layer_parameters(self.model) if zero3 else float(self.model.parameters())
        spec = TensorSpec((ceil(parameters / n),), self.dtype)
        schedules, symmetry = fold(partial(all_gather, small, spec=spec), small)
        once = simulate(schedules, self.cluster, symmetry=symmetry).seconds
        once *= (1 - 1 / self.ranks) / (1 - 1 / n)
        return 3 * self.model.num_hidden_layers * once if zero3 else 2 * once


def _pairs(s: np.ndarray, kind: LayerKind) -> np.ndarray:
    """`LayerKind.pairs` of many lengths."""
    if kind.type == "linear_attention":
        return np.zeros_like(s)
    w = s if kind.window is None else np.minimum(s, kind.window)
    return w * (w + 1) / 2 + (s - w) * w


def _least_squares(rows: list[list[float]], values: list[float]) -> list[float]:
    """Coefficients of least squared relative errors, none below 0."""
    a, y = np.array(rows), np.array(values)
    if not y.any():
        return [0.0] * a.shape[1]
    a = a / y[:, None]
    scale = np.abs(a).max(axis=0)
    keep = list(range(a.shape[1]))
    while True:
        found = np.linalg.lstsq(a[:, keep] / scale[keep], np.ones(len(y)), rcond=None)[0]
        if (found >= 0).all() or len(keep) == 1:
            break
        keep.pop(int(found.argmin()))
    result = [0.0] * a.shape[1]
    for column, value in zip(keep, found, strict=True):
        result[column] = max(0.0, float(value / scale[column]))
    return result
