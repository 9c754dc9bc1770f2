"""A whole training step as a schedule: the modules of the decoder, attention by its own schedule, FSDP2, the optimizer.

    for every sequence of this replica
        gather the root's parameters; embedding
        every layer: gather its parameters; qkv; attention forward; out; mlp
        head and loss, and back: head; every layer: gather, mlp, out, attention, qkv, reduce its gradients
        embedding, and reduce the root's gradients (gradients are reduced with the last sequence only)
    clip by the global norm; optimizer on this rank's shard

Parameters, gradients and moments are spread over all ranks (FSDP2); a layer's parameters are whole while it runs. Ranks
number the mesh data x sequence axes row by row. The runtime reaches the same steps through torch's modules and the
attention call (training/step.py); the simulator executes them. `Schedule.phases` says which part a step belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

from counterpoint.kernels.kernel import ITEM_BYTES, TensorSpec
from counterpoint.kernels.module import Module, Operator
from counterpoint.kernels.pointwise import After
from counterpoint.model.config import ModelConfig
from counterpoint.model.work import LAYER_PARTS, Part, clip_work, model_parts, moved, optimizer_work
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.schedule import Schedule, Value
from counterpoint.strategies.memory.cost import Block, saved_tensors, total
from counterpoint.strategies.sequence.attention import (
    AttentionProblem,
    Choice,
    backward_schedule,
    coordinates,
    forward_schedule,
)
from counterpoint.strategies.sequence.blocks import AttentionShape
from counterpoint.strategies.sequence.layout import SequenceLayout

# Phases in the order in which a step meets them first.
PHASES = (
    "gather", "embedding", "qkv", "attention forward", "out", "mlp", "head",
    "head backward", "mlp backward", "out backward", "attention backward", "qkv backward", "reduce",
    "embedding backward", "clip", "optimizer",
)  # fmt: skip


@dataclass(frozen=True)
class TrainStep:
    """One optimizer step of a decoder: the model, its sequences, and how the work is split.

    tokens: of a sequence. sequences: that a replica works on, one after the other. data: replicas. mesh: sizes of the
    sequence axes, outermost first; forward, backward: one strategy for each. dtype: of activations and of gathered
    parameters; float32 is what is stored. documents: lengths of the packed documents, empty for one. overlapped: do
    gathers and reductions run beside computation (GPUs), or does the rank wait for them (CPU, gloo). clip: are
    gradients clipped.
    """

    model: ModelConfig
    tokens: int
    sequences: int
    data: int
    mesh: tuple[int, ...]
    layout: str
    forward: tuple[Choice, ...]
    backward: tuple[Choice, ...]
    dtype: str = "float32"
    documents: tuple[int, ...] = ()
    overlapped: bool = False

    def __post_init__(self) -> None:
        if self.sequences < 1 or self.data < 1:
            raise ValueError(f"{self.sequences} sequences on {self.data} replicas: give at least 1 of each")
        if self.tokens < self.sequence_size:
            raise ValueError(f"{self.tokens} tokens leave some of {self.sequence_size} ranks without any")

    @property
    def sequence_size(self) -> int:
        return prod(self.mesh)

    @property
    def world_size(self) -> int:
        return self.data * self.sequence_size

    @property
    def tokens_per_step(self) -> int:
        return self.tokens * self.sequences * self.data

    def sequence_layout(self) -> SequenceLayout:
        return SequenceLayout(self.layout, self.tokens, self.sequence_size, self.documents)

    def attention(self, layer: int) -> AttentionProblem:
        """The attention of a layer, as the trainer asks for it."""
        m, axes = self.model, 1 if self.sequence_size == 1 else len(self.mesh)
        shape = AttentionShape(1, m.num_attention_heads, m.num_key_value_heads, m.head_dim, self.dtype, None)
        mesh = self.mesh if self.sequence_size > 1 else (1,)
        ways = self.forward[:axes], self.backward[:axes]
        return AttentionProblem(shape, self.sequence_layout(), mesh, *ways, True, m.window(layer))


def shard_parameters(step: TrainStep, parameters: int) -> int:
    """Parameters that every rank keeps of so many; the last shard is padded."""
    return -(-parameters // step.world_size)


@lru_cache(maxsize=8)
def step_schedule(step: TrainStep, rank: int) -> Schedule:
    """The training step of one rank. Inputs are what it holds between steps: its shards of the state."""
    writer = _Writer(step, rank)
    for number in range(step.sequences):
        writer.sequence(number)
    return writer.update()


class _Writer:
    """Writes the step of one rank; a value is called "layer 3 mlp/x": the phase's own part, then the name."""

    def __init__(self, step: TrainStep, rank: int) -> None:
        self.step, self.rank = step, rank
        self.b = Builder("training step", rank, step.world_size)
        self.place = rank % step.sequence_size  # within the ranks that share a sequence
        self.ranks = range(rank - self.place, rank - self.place + step.sequence_size)
        self.local = step.sequence_layout().local_tokens(self.place)
        self.parts = model_parts(step.model, self.local, step.dtype)
        self.layer_size = sum(self.parts[p].parameters for p in LAYER_PARTS)
        self.root_size = self.parts["embedding"].parameters + self.parts["head"].parameters
        norm = "fused" if step.overlapped else "composed"
        saved = saved_tensors(Block(step.model, 1, self.local, step.dtype, norm))
        self.saved = {
            "qkv": total(saved, ("input", "norm")),
            "mlp": total(saved, ("mlp_norm", "mlp")),
            "head": 2 * self.local * step.model.hidden_size * ITEM_BYTES[step.dtype],
        }
        layers = [f"layer {i}" for i in step.model.layers]
        self.shards = {name: self._shard(name, self.layer_size) for name in layers}
        self.shards["root"] = self._shard("root", self.root_size)
        shard = sum(v.spec.shape[0] for v in self.shards.values())
        self.moments = self.b.input("moments", TensorSpec((2, shard)))
        self.gradients: dict[str, list[Value]] = {}  # whole ones, until they are reduced
        self.reduced: list[Value] = []  # gradients, as the optimizer reads them

    # ---- the passes over one sequence ----------------------------------------------------------
    def sequence(self, number: int) -> None:
        """Forward and backward of one sequence; the last one's gradients are reduced with all before it."""
        m, last = self.step.model, number == self.step.sequences - 1
        self.name = f"sequence {number} " if self.step.sequences > 1 else ""
        hidden = TensorSpec((1, self.local, m.hidden_size), self.step.dtype)
        start = self.gradients.get("root", [self.shards["root"]])[0]
        root = self._gather("root", self.root_size, start)
        (x,) = self._module("embedding", self.parts["embedding"].forward, (hidden,), root)
        known, inputs, before = [], [], x
        for i in m.layers:
            weights = self._gather(f"layer {i}", self.layer_size, before if self.step.overlapped else x)
            before = x
            inputs.append(x)
            x, kept = self._layer(i, x, weights)
            known.append((kept, weights))
        saved = _bytes(self.saved["head"])
        x, kept = self._module("head", self.parts["head"].forward, (TensorSpec((1,)), saved), x, root)
        dx, *grads = self._module(
            "head backward",
            self.parts["head"].backward,
            (hidden, self._whole(self.parts["head"])),
            x,
            kept,
            root,
        )
        self._keep("root", grads)
        after = dx
        for i in reversed(m.layers):
            kept, _ = known.pop()
            # begun one layer ahead, on CPUs as well
            weights = self._gather(f"layer {i}", self.layer_size, after, again=True)
            after = dx
            dx = self._layer_backward(i, dx, kept, weights)
            if last:
                dx = self._reduce(f"layer {i}", dx)
        (grad,) = self._module(
            "embedding backward",
            self.parts["embedding"].backward,
            (self._whole(self.parts["embedding"]),),
            dx,
        )
        self._keep("root", [grad])
        if last:
            self._reduce("root", dx, "embedding backward")

    def _layer(self, i: int, x: Value, weights: Value) -> tuple[Value, dict[str, Value]]:
        m, rows = self.step.model, self.local
        problem, where = self.step.attention(i), f"layer {i} "
        q = TensorSpec((1, rows, m.num_attention_heads, m.head_dim), self.step.dtype)
        kv = TensorSpec((1, rows, m.num_key_value_heads, m.head_dim), self.step.dtype)
        made = (q, kv, kv, _bytes(self.saved["qkv"]))
        names = ("q", "k", "v", "saved")
        *qkv, saved = self._module(
            "qkv", self.parts["qkv"].forward, made, x, weights, where=where, names=names
        )
        given = dict(zip("qkv", qkv, strict=True))
        out = self._attention("attention forward", forward_schedule(problem, self.place), given, where)
        (h,) = self._module("out", self.parts["out"].forward, (x.spec,), out["out"], x, weights, where=where)
        made = (x.spec, _bytes(self.saved["mlp"]))
        y, mlp = self._module("mlp", self.parts["mlp"].forward, made, h, weights, where=where)
        return y, {**given, **out, "saved qkv": saved, "saved mlp": mlp}

    def _layer_backward(self, i: int, dy: Value, kept: dict[str, Value], weights: Value) -> Value:
        problem, where = self.step.attention(i), f"layer {i} "
        hidden = dy.spec
        grads: dict[str, Value] = {}

        def module(part: str, made: tuple[TensorSpec, ...], *inputs: Value) -> list[Value]:
            specs = (*made, self._whole(self.parts[part]))
            operators = self.parts[part].backward
            *values, grads[part] = self._module(
                f"{part} backward", operators, specs, *inputs, weights, where=where
            )
            return values

        (dh,) = module("mlp", (hidden,), dy, kept["saved mlp"])
        (dout,) = module("out", (kept["out"].spec,), dh, kept["out"])
        backward = backward_schedule(problem, self.place)
        known = {**kept, "dout": dout}
        given = {v.name: known[v.name] for v in backward.inputs}
        made = self._attention("attention backward", backward, given, where)
        (dx,) = module("qkv", (hidden,), made["dq"], made["dk"], made["dv"], kept["saved qkv"], dh)
        self._keep(f"layer {i}", list(grads.values()))
        return dx

    def _attention(
        self, phase: str, schedule: Schedule, given: dict[str, Value], where: str
    ) -> dict[str, Value]:
        self.b.phase = phase
        return self.b.inline(schedule, given, f"{self.name}{where}{phase}/", self.ranks)

    # ---- parameters and gradients --------------------------------------------------------------
    def _gather(self, name: str, size: int, after: Value, again: bool = False) -> Value:
        """A layer's parameters, whole; begun once `after` exists."""
        shard = self.shards[name]
        if self.step.world_size == 1:
            return shard
        phase, b = "reduce" if again else "gather", self.b
        b.phase = phase
        where = f"{self.name}{name} {phase}/"
        part, stream = shard.spec.cast(self.step.dtype), "state copies"
        if after is not shard:
            (shard,) = b.compute(After(), shard, after, names=[f"{where}parameters"], stream=stream)
        if part != shard.spec:
            cast = Module("cast", moved("cast", shard.nbytes), (part,))
            (shard,) = b.compute(cast, shard, names=[f"{where}half"], stream=stream)
        peers = self._peers()
        wanted = {r: [(f"{where}parameters{r}", part)] for r in peers}
        parts = b.collective("all_gather", "state", {r: [shard] for r in peers}, wanted)
        whole = TensorSpec((size,), self.step.dtype)
        join = Module("unshard", moved("unshard", whole.nbytes), (whole,))
        given = [shard, *(value for values in parts.values() for value in values)]
        return b.compute(join, *given, names=[f"{where}parameters"], stream=stream)[0]

    def _keep(self, name: str, grads: list[Value]) -> None:
        self.gradients[name] = self.gradients.get(name, []) + grads

    def _reduce(self, name: str, dx: Value, phase: str = "reduce") -> Value:
        """Sums the gradients of a layer over all ranks; each keeps its shard. Returns `dx`, for what comes next."""
        grads, shard = self.gradients.pop(name), self.shards[name].spec
        if self.step.world_size == 1:
            self.reduced += grads
            return dx
        b, stream = self.b, "state copies"
        b.phase = phase
        where, peers = f"{self.name}{name} {phase}/", self._peers()
        nbytes = sum(g.nbytes for g in grads)
        pack = Module("pack", moved("pack", nbytes), (shard,) * self.step.world_size)
        names = [f"{where}gradients{r}" for r in (self.rank, *peers)]
        own, *pieces = b.compute(pack, *grads, names=names, stream=stream)
        sends = {r: [piece] for r, piece in zip(peers, pieces, strict=True)}
        wanted = {r: [(f"{where}from{r}", shard)] for r in peers}
        parts = b.collective("reduce_scatter", "state", sends, wanted)
        received = [value for values in parts.values() for value in values]
        n = shard.shape[0] * len(received)
        add = Module("sum", (*moved("sum", 4 * n),), (shard,))
        (total,) = b.compute(add, own, *received, names=[f"{where}gradients"], stream=stream)
        self.reduced.append(total)
        if self.step.overlapped:
            return dx
        return b.compute(After(), dx, total, names=[f"{where}dx"])[0]

    def update(self) -> Schedule:
        """Clip and update; the schedule is then complete."""
        self.name = ""
        b, peers = self.b, self._peers()
        size = sum(v.spec.shape[0] for v in self.shards.values())
        one = TensorSpec((1,))
        (norm,) = self._module("clip", clip_work(size), (one,), *self.reduced, names=["norm"])
        if peers:
            wanted = {r: [(f"clip/norm{r}", one)] for r in peers}
            parts = b.collective("all_reduce", "norm", {r: [norm] for r in peers}, wanted)
            norms = [value for values in parts.values() for value in values]
            (norm,) = b.compute(Module("clip", (), (one,)), norm, *norms, names=["clip/norm"])
        state = [self.moments, *self.shards.values()]
        (done,) = self._module("optimizer", optimizer_work(size), (one,), norm, *self.reduced, *state)
        return b.finish({"done": done})

    # ---- helpers -------------------------------------------------------------------------------
    def _module(
        self,
        phase: str,
        operators: tuple[Operator, ...],
        made: tuple[TensorSpec, ...],
        *inputs: Value,
        where: str = "",
        names: Sequence[str] = (),
    ) -> tuple[Value, ...]:
        self.b.phase = phase
        names = [f"{self.name}{where}{phase}/{name}" for name in names or ["x", "saved", *"yz"][: len(made)]]
        return self.b.compute(Module(phase, operators, made), *inputs, names=names)

    def _shard(self, name: str, parameters: int) -> Value:
        return self.b.input(f"{name}/parameters", TensorSpec((shard_parameters(self.step, parameters),)))

    def _whole(self, part: Part) -> TensorSpec:
        """The gradients of a part, in the dtype of its parameters while they are whole."""
        return TensorSpec((part.parameters,), self.step.dtype)

    def _peers(self) -> list[int]:
        """All other ranks, in an order that looks the same to every rank of the mesh."""
        mesh = (self.step.data, *self.step.mesh)
        here, found = coordinates(mesh, self.rank), []
        for turn in product(*map(range, mesh)):
            there = 0
            for size, a, by in zip(mesh, here, turn, strict=True):
                there = there * size + (a + by) % size
            found.append(there)
        return found[1:]


def _bytes(n: int) -> TensorSpec:
    return TensorSpec((n,), "uint8")
