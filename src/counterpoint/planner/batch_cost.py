"""What a group of ranks takes for its sequences, as sums over sequences, so that solvers can plan with it.

Nothing is a constant of this file: for every size and place of a group the kernels and messages of the strategy's own
schedule are costed on the cluster (`batch_probe`) for a few loads, and a1 pairs + a2 tokens + b is fitted to them
(FlexSP, arXiv 2412.01523, section 4.1, with visible pairs in place of s^2 so that windows and layer types add up).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from math import ceil
from typing import Literal

from counterpoint.cluster.cluster import Cluster
from counterpoint.cluster.device import Device
from counterpoint.kernels.kernel import TensorSpec
from counterpoint.model.config import ModelConfig
from counterpoint.planner import batch_probe, layer_work
from counterpoint.planner.batch_linear import linear_passes, move_passes
from counterpoint.planner.batch_probe import GroupStrategy
from counterpoint.planner.group_cost import MOVES, GroupCost, LayerCost, Linear, least_squares, waiting
from counterpoint.planner.layer_work import LayerKind, layer_kinds
from counterpoint.strategies.data.gather import all_gather
from counterpoint.strategies.sequence.blocks import AttentionShape
from counterpoint.strategies.sequence.linear import parse_linear

State = Literal["zero1", "zero3"]
RESERVE = 0.1  # share of the memory left to the library, the allocator and buffers of collectives
SHARES = (1.0, 1 / 8, 1 / 64, 1 / 1024)  # visible pairs, of those that one sequence of all tokens has
LOADS = (1.0, 1 / 3, 1 / 12)  # tokens a rank, as shares of what it can hold


@dataclass
class BatchCost:
    """Costs and memory of batches of a model on the first `ranks` ranks of a cluster.

    strategy: how a group shares its sequences; where Ulysses has too few heads the group is a ring. linear: strategy
    of linear attention layers, whose tokens lie in order; a ring's do not, so that hidden states change their layout
    between the two. state: "zero3"
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
    linear: str = "states"
    _groups: dict[tuple, GroupCost] = field(default_factory=dict, repr=False)
    _layers: dict[tuple, LayerCost] = field(default_factory=dict, repr=False)
    _kernels: dict[tuple, float] = field(default_factory=dict, repr=False)
    _probes: dict[batch_probe.Probe, float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.ranks <= self.cluster.world_size:
            raise ValueError(
                f"{self.ranks} ranks were asked for, but cluster {self.cluster.name} has 1 to {self.cluster.world_size}"
            )
        if self.tokens_per_rank is not None and self.tokens_per_rank < 1:
            raise ValueError(f"tokens_per_rank is {self.tokens_per_rank}; give at least 1")
        self.linear = str(parse_linear(self.linear))

    def with_strategies(self, strategy: GroupStrategy, linear: str) -> BatchCost:
        """The same with other strategies; layers that have been fitted are shared."""
        return replace(self, strategy=strategy, linear=linear, _groups={})

    @property
    def offloads(self) -> bool:
        """Whether activations can go to host memory: that of the first and of the last layer stay."""
        return len(self.cluster.device(0).memory) > 1 and self.model.num_hidden_layers > 2

    @property
    def strategies(self) -> dict[str, str]:
        """The strategy of every type of layers that the model has."""
        return {
            kind.label: self.linear if kind.type == "linear_attention" else self.strategy
            for kind in layer_kinds(self.model)
        }

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
        """Most tokens a rank can hold when it offloads this share of the inner layers' activations to the host."""
        away = offload * self._inner_bytes
        held = self.capacity * self.token_bytes / (self.token_bytes - away)
        if away:
            held = min(held, self.cluster.device(0).memory[1].size_bytes / away)
        return int(held)

    @property
    def _inner_bytes(self) -> float:
        """Bytes that a token keeps in the layers that can offload them."""
        return max(0, self.model.num_hidden_layers - 2) * self.layer_bytes if self.offloads else 0.0

    @cached_property
    def most_offload(self) -> float:
        """The share with which a rank holds the most: all, or less where host memory is full first; 0 without one."""
        if not self.offloads:
            return 0.0
        host = self.cluster.device(0).memory[1].size_bytes
        return min(
            1.0, host * self.token_bytes / (self._inner_bytes * (self.capacity * self.token_bytes + host))
        )

    def offload_for(self, tokens: int) -> float:
        """The least share with which a rank can hold so many tokens; more than `most_offload` when none does."""
        return max(0.0, self.token_bytes * (1 - self.capacity / tokens) / self._inner_bytes + 1e-9)

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
        kinds = [
            (kind, count, self._layer(kind, ranks, loads)) for kind, count in layer_kinds(self.model).items()
        ]
        if moves := self._moves(size):
            kinds.append((LayerKind(MOVES), moves, self._layer(LayerKind(MOVES), ranks, loads)))
        ends = []
        for t in loads:
            work = layer_work.head_operations(self.model, t, self.dtype)
            ends.append(sum(layer_work.seconds(device, work, self.dtype, backward=b) for b in (False, True)))
        token, fixed = least_squares([[t, 1.0] for t in loads], ends)
        return GroupCost(size, self.strategy_of(size), tuple(kinds), Linear(0.0, token / size, fixed))

    def _moves(self, size: int) -> int:
        """How often hidden states of a group change their layout in a forward pass."""
        if size == 1 or self.strategy_of(size) == "ulysses":
            return 0
        linear = [self.model.is_linear(layer) for layer in self.model.layers]
        return sum(a != b for a, b in pairwise(linear))

    def _layer(self, kind: LayerKind, ranks: tuple[int, ...], loads: list[int]) -> LayerCost:
        """One layer of this kind, forward and backward (and forward again where layers are recomputed)."""
        strategy = self.linear if kind.type == "linear_attention" else self.strategy_of(len(ranks))
        key = (kind, strategy, self._place(ranks))
        if key not in self._layers:
            fit = {"linear_attention": self._fit_linear, MOVES: self._fit_move}.get(
                kind.type, self._fit_softmax
            )
            self._layers[key] = fit(kind, ranks, loads)
        return self._layers[key]

    def _fit_softmax(self, kind: LayerKind, ranks: tuple[int, ...], loads: list[int]) -> LayerCost:
        size, device = len(ranks), self.cluster.device(ranks[0])
        strategy, again = self.strategy_of(size), 1 + self.recompute
        rows, times, attends = [], [], []
        for t in loads:
            around = self._around(kind, t, device)
            for share in SHARES:
                f, b = batch_probe.compute(self.shape, strategy, size, t, share, device, self._kernels)
                whole = t * size
                rows.append([share * whole * (whole + 1) / 2, whole, 1.0])
                times.append(around + again * f + b)
                attends.append(again * f + b)
        compute = Linear(*least_squares(rows, times))
        if size == 1:
            return LayerCost(compute)
        ends = [loads[0], loads[-1]]  # messages have no other figure than their size
        passes = batch_probe.communication(
            self.shape, strategy, ranks, ends, self.cluster, again, self._probes
        )
        exposed, travelling = (
            Linear(0.0, *least_squares([[t * size, 1.0] for t in ends], list(found))) for found in passes
        )
        whole = ends[-1] * size
        sent = Linear(0.0, batch_probe.sent_bytes(self.shape, strategy, size, ends[-1], again) / whole)
        if strategy == "ulysses":
            return LayerCost(compute, exposed, sent=sent)
        # messages of all steps but one travel while blocks are attended and merged
        hiding = Linear(*least_squares(rows, attends)).times((size - 1) / size)
        return LayerCost(compute, exposed, travelling, hiding, sent)

    def _fit_linear(self, kind: LayerKind, ranks: tuple[int, ...], loads: list[int]) -> LayerCost:
        size, device = len(ranks), self.cluster.device(ranks[0])
        again = 1 + self.recompute
        passes = [linear_passes(self.model, self.dtype, self.linear, ranks, t, self.cluster) for t in loads]
        times = [
            self._around(kind, t, device) + again * f.compute + b.compute
            for t, (f, b) in zip(loads, passes, strict=True)
        ]
        tokens = [float(t * size) for t in loads]
        waits = waiting(tokens, [again * f.waiting + b.waiting for f, b in passes])
        compute = Linear(0.0, *least_squares([[t, 1.0] for t in tokens], times))
        f, b = passes[-1]
        return replace(waits, compute=compute, sent=Linear(0.0, 0.0, again * f.sent + b.sent))

    def _fit_move(self, kind: LayerKind, ranks: tuple[int, ...], loads: list[int]) -> LayerCost:
        """A change of layout: there in the forward pass, back in the backward pass, or the other way round."""
        hidden, size = TensorSpec((1, 0, self.model.hidden_size), self.dtype), len(ranks)
        rows, times = [], []
        for t in (loads[0], loads[-1]):
            there, back = move_passes(hidden, "zigzag", ranks, t, self.cluster)
            rows.append([float(t * size), 1.0])
            times.append(sum(p.compute + p.waiting for p in (there, back)))
        sent = (there.sent + back.sent) / rows[-1][0]
        return LayerCost(Linear(), Linear(0.0, *least_squares(rows, times)), sent=Linear(0.0, sent))

    def _around(self, kind: LayerKind, tokens: int, device: Device) -> float:
        """Seconds of a layer's products, norms and sums, apart from attention itself."""
        forward, backward = layer_work.layer_seconds(device, self.model, tokens, self.dtype, kind)
        return (1 + self.recompute) * forward + backward

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
