"""A whole training step as a schedule: the modules of the decoder, attention by its own schedule, FSDP2, the optimizer.

    for every sequence of this replica
        gather the root's parameters; embedding
        every layer: gather its parameters; qkv; attention forward; out; mlp
        head and loss, and back: head; every layer: gather, mlp, out, attention, qkv, reduce its gradients
            (recomputed layers: forward again first; offloaded ones: what went to the host comes back one layer ahead)
        embedding, and reduce the root's gradients (gradients are reduced with the last sequence only)
    clip by the global norm; optimizer on this rank's shard

Parameters, gradients and moments are spread over all ranks (FSDP2); a layer's parameters are whole while it runs. Ranks
number the mesh data x sequence axes row by row. The runtime reaches the same steps through torch's modules and the
attention call (training/step.py); the simulator executes them. `Schedule.phases` says which part a step belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from math import prod

from counterpoint.kernels.kernel import ITEM_BYTES, TensorSpec
from counterpoint.kernels.module import Module
from counterpoint.kernels.pointwise import After
from counterpoint.model.config import ModelConfig
from counterpoint.model.work import clip_work, model_parts, moved, optimizer_work
from counterpoint.schedule.schedule import Recv, Schedule, Value
from counterpoint.strategies.memory.policy import MemoryPolicy
from counterpoint.strategies.sequence.attention import AttentionProblem, Choice, coordinates
from counterpoint.strategies.sequence.blocks import AttentionShape
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.strategies.sequence.linear import LinearProblem
from counterpoint.strategies.sequence.linear_builder import LinearShape
from counterpoint.strategies.sequence.relayout import relayout_schedule
from counterpoint.strategies.step_layers import LinearLayer, SoftmaxLayer
from counterpoint.strategies.step_modules import Modules, Values, opaque

# Phases in the order in which a step meets them first.
PHASES = (
    "gather", "embedding", "layout", "qkv", "attention forward", "out", "mlp", "offload", "head",
    "head backward", "mlp backward", "out backward", "attention backward", "qkv backward", "layout backward", "reduce",
    "embedding backward", "clip", "optimizer",
)  # fmt: skip


@dataclass(frozen=True)
class TrainStep:
    """One optimizer step of a decoder: the model, its sequences, and how the work is split.

    tokens: of a sequence. sequences: that a replica works on, one after the other. data: replicas. mesh: sizes of the
    sequence axes, outermost first; forward, backward: one strategy for each. dtype: of activations and of gathered
    parameters; float32 is what is stored. documents: lengths of the packed documents, empty for one. overlapped: do
    gathers and reductions run beside computation (GPUs), or does the rank wait for them (CPU, gloo). linear: strategy
    of linear attention layers. memory: what layers keep of a forward pass; streams have no schedule here.
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
    linear: Choice = field(default_factory=lambda: Choice("states"))
    memory: MemoryPolicy = field(default_factory=MemoryPolicy)

    def __post_init__(self) -> None:
        if any(policy.kind == "stream" for policy in self.memory.layers):
            raise ValueError(
                "a step of the trainer has no schedule for memory policy stream yet; `counterpoint plan memory` knows "
                "it, for sequences of one rank"
            )
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

    def states(self) -> LinearProblem:
        """The attention of linear layers."""
        layout = self.layouts(self.sequence_layout())[True]
        return LinearProblem(self.linear_shape, layout, self.linear, self.linear)

    @property
    def linear_shape(self) -> LinearShape:
        m = self.model.linear
        assert m is not None
        return LinearShape(1, m.num_heads, m.key_head_dim, m.value_head_dim, m.decay_form, self.dtype)  # type: ignore[arg-type]

    def layouts(self, layout: SequenceLayout) -> dict[bool, SequenceLayout]:
        """Where tokens lie in softmax layers (False) and in linear ones (True), which take them in order."""
        ordered = SequenceLayout("contiguous", layout.tokens, layout.world_size, layout.documents)
        return {False: layout, True: ordered if layout.world_size > 1 else layout}


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
    """Writes the step of one rank."""

    def __init__(self, step: TrainStep, rank: int) -> None:
        self.step, self.rank, m = step, rank, step.model
        self.modules = Modules(step, rank)
        self.b, self.place = self.modules.b, self.modules.place
        self.linear = [m.is_linear(i) for i in m.layers]
        self.layouts = step.layouts(step.sequence_layout())
        self.layers: dict[bool, SoftmaxLayer] = {}
        for i, linear in enumerate(self.linear):
            kind = LinearLayer if linear else SoftmaxLayer
            self.layers.setdefault(linear, kind(self.modules, self.layouts[linear], i))
        first, last = (self.layouts[self.linear[i]].local_tokens(self.place) for i in (0, -1))
        self.embedding = model_parts(m, first, step.dtype)["embedding"]
        self.head = model_parts(m, last, step.dtype)["head"]
        self.root_size = self.embedding.parameters + self.head.parameters
        self.saved_head = 2 * last * m.hidden_size * ITEM_BYTES[step.dtype]
        self.shards = {f"layer {i}": self._shard(f"layer {i}", self._of(i).size) for i in m.layers}
        self.shards["root"] = self._shard("root", self.root_size)
        shard = sum(v.spec.shape[0] for v in self.shards.values())
        self.moments = self.b.input("moments", TensorSpec((2, shard)))
        self.gradients: dict[str, list[Value]] = {}  # whole ones, until they are reduced
        self.reduced: list[Value] = []  # gradients, as the optimizer reads them

    def _of(self, layer: int) -> SoftmaxLayer:
        return self.layers[self.linear[layer]]

    # ---- the passes over one sequence ----------------------------------------------------------
    def sequence(self, number: int) -> None:
        """Forward and backward of one sequence; the last one's gradients are reduced with all before it."""
        m, last, modules = self.step.model, number == self.step.sequences - 1, self.modules
        modules.name = f"sequence {number} " if self.step.sequences > 1 else ""
        start = self.gradients.get("root", [self.shards["root"]])[0]
        root = self._gather("root", self.root_size, start)
        (x,) = modules.module("embedding", self.embedding.forward, (self._of(0).hidden,), root)
        known: list[Values] = []
        before = x
        for i in m.layers:
            weights = self._gather(f"layer {i}", self._of(i).size, before if self.step.overlapped else x)
            before = x
            x, kept = self._forward(i, self._moved(i, x, "layout"), weights)
            known.append(kept)
        made = TensorSpec((1,)), opaque(self.saved_head)
        x, kept = modules.module("head", self.head.forward, made, x, root)
        hidden = self._of(-1 % m.num_hidden_layers).hidden
        dx, *grads = modules.module(
            "head backward", self.head.backward, (hidden, modules.gradient(self.head)), x, kept, root
        )
        self._keep("root", grads)
        after = dx
        for i in reversed(m.layers):
            # begun one layer ahead, on CPUs as well
            weights = self._gather(f"layer {i}", self._of(i).size, after, again=True)
            after = dx
            if i:
                known[i - 1] = self._fetched(known[i - 1], dx)
            dx = self._backward(i, dx, self._fetched(known.pop(), dx), weights)
            if last:
                dx = self._reduce(f"layer {i}", dx)
            dx = self._moved(i, dx, "layout backward")
        made = (modules.gradient(self.embedding),)
        (grad,) = modules.module("embedding backward", self.embedding.backward, made, dx)
        self._keep("root", [grad])
        if last:
            self._reduce("root", dx, "embedding backward")

    def _forward(self, i: int, x: Value, weights: Value) -> tuple[Value, Values]:
        """A layer's output, and what its policy keeps of the pass; "host ..." has gone there."""
        policy = self.step.memory.layer(i, self.step.model.num_hidden_layers)
        gone = self._of(i).gone(policy)
        y, kept = self._of(i).forward(i, x, weights, gone)
        if policy.kind == "recompute":
            return y, {"x": x}
        for name in [n for n in kept if n in gone or n.startswith("away ")]:
            self.b.phase = "offload"
            kept[f"host {name}"] = self.b.copy(kept.pop(name), "host", "to_host")
        return y, kept

    def _fetched(self, kept: Values, after: Value) -> Values:
        """What was kept, with that in host memory on its way back once `after` exists."""
        found = {}
        for name, value in kept.items():
            if name.startswith("host "):
                self.b.phase = "offload"
                (ready,) = self.b.compute(After(), value, after)
                value = self.b.copy(ready, "device", "from_host")
            found[name.removeprefix("host ")] = value
        return found

    def _backward(self, i: int, dy: Value, kept: Values, weights: Value) -> Value:
        layer = self._of(i)
        if set(kept) == {"x"}:
            (x,) = self.b.compute(After(), kept["x"], dy)
            kept = layer.forward(i, x, weights, again=True)[1]
        dx, grads = layer.backward(i, dy, kept, weights)
        self._keep(f"layer {i}", grads)
        return dx

    def _moved(self, i: int, x: Value, phase: str) -> Value:
        """Hidden states on their way into layer i, or their gradients out of it, in the layout of the other side."""
        if not i or self.linear[i] == self.linear[i - 1]:
            return x
        ways = [self.layouts[self.linear[layer]] for layer in (i - 1, i)]
        if ways[0] == ways[1]:
            return x
        source, target = ways if phase == "layout" else ways[::-1]
        schedule = relayout_schedule(x.spec, source, target, self.place)
        return self.modules.inline(phase, schedule, {"x": x}, f"layer {i} ")["y"]

    # ---- parameters and gradients --------------------------------------------------------------
    def _gather(self, name: str, size: int, after: Value, again: bool = False) -> Value:
        """A layer's parameters, whole; begun once `after` exists."""
        shard = self.shards[name]
        if self.step.world_size == 1:
            return shard
        phase, b = "reduce" if again else "gather", self.b
        b.phase = phase
        where = f"{self.modules.name}{name} {phase}/"
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
        where, peers = f"{self.modules.name}{name} {phase}/", self._peers()
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
        self.modules.name = ""
        b, peers = self.b, self._peers()
        size = sum(v.spec.shape[0] for v in self.shards.values())
        one = TensorSpec((1,))
        (norm,) = self.modules.module("clip", clip_work(size), (one,), *self.reduced, names=["norm"])
        if peers:
            wanted = {r: [(f"clip/norm{r}", one)] for r in peers}
            parts = b.collective("all_reduce", "norm", {r: [norm] for r in peers}, wanted)
            norms = [value for values in parts.values() for value in values]
            (norm,) = b.compute(Module("clip", (), (one,)), norm, *norms, names=["clip/norm"])
        if any(self.linear) and self.step.sequence_size > 1:
            # states that arrived stay where they were received until the layer's backward pass
            for arrival in self.step.states().schedule("forward", self.place).steps:
                if isinstance(arrival, Recv):
                    b.depth(arrival.channel, 2 + sum(self.linear))
        state = [self.moments, *self.shards.values()]
        (done,) = self.modules.module("optimizer", optimizer_work(size), (one,), norm, *self.reduced, *state)
        return b.finish({"done": done})

    # ---- helpers -------------------------------------------------------------------------------
    def _shard(self, name: str, parameters: int) -> Value:
        return self.b.input(f"{name}/parameters", TensorSpec((shard_parameters(self.step, parameters),)))

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
