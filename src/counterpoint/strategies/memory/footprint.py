"""The most memory a step takes on one rank, from schedules of its parts.

A step's memory rises and falls: what layers keep grows through the forward pass; the head adds its logits; in the
backward pass kept bytes go while gradients come. So the peak is the largest of few sums: for every layer what those
before it keep, what it needs itself, and the gradients of those behind it. The addends are measured on schedules of a
layer, the head and the embedding, made by the very writers that write a whole step, whose peak they give exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

from counterpoint.kernels.kernel import ITEM_BYTES, TensorSpec
from counterpoint.kernels.loss import Embed, EmbedBackward
from counterpoint.kernels.pointwise import Accumulate, After, Empty
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.live import live_bytes
from counterpoint.schedule.schedule import Copy
from counterpoint.strategies.memory.cost import rotary_bytes
from counterpoint.strategies.memory.head import HeadWriter
from counterpoint.strategies.memory.layer import LayerWriter, Recipe
from counterpoint.strategies.memory.layers import write_layer
from counterpoint.strategies.memory.policy import LayerPolicy
from counterpoint.strategies.memory.sharding import Shards, Training
from counterpoint.strategies.memory.step import Step, parameter_groups
from counterpoint.strategies.memory.weights import adapter_weights, layer_weights

Writes = Callable[..., LayerWriter]


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Of one layer. saved: kept from forward to backward. forward, backward: most bytes during the pass, with input and
    output, parameters in shares or whole apart. gradients: what stays of them afterwards.
    offloaded: what goes to host memory and comes back."""

    saved: int
    forward: int
    backward: int
    gradients: int
    offloaded: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """The peak of a step, by what it consists of at that moment, in bytes.

    checkpoints: what the other layers keep. working: what the part that runs needs, its own kept bytes included.
    shared: tokens, labels, rotary angles. where: the part of the step. host: bytes in host memory at their most.
    """

    parameters: int
    optimizer: int
    gradients: int
    checkpoints: int
    working: int
    shared: int
    where: str
    host: int = 0

    @property
    def total(self) -> int:
        return (
            self.parameters + self.optimizer + self.gradients + self.checkpoints + self.working + self.shared
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}


def footprint(step: Step, overlap: bool = True, writes: Writes = write_layer) -> Footprint:
    """The peak of a step on each of its ranks; arguments as for `moments`."""
    return max(moments(step, overlap, writes), key=lambda moment: moment.total)


def moments(step: Step, overlap: bool = True, writes: Writes = write_layer) -> list[Footprint]:
    """The peaks of all parts of a step, in their order. overlap: what a layer offloads is still there while the next
    one runs; else it is gone at once, as in a schedule whose steps run one after the other. writes: the writer."""
    t, config = step.training, step.block.config
    layers = [layer_bytes(step.recipe(i), t, _kind(step, i), writes) for i in config.layers]
    groups = parameter_groups(step.block)
    parameters, optimizer, old = _standing(step, groups)
    shared = rotary_bytes(step.block) + 16 * step.block.batch * step.block.tokens
    before = [0, *accumulate(layer.saved for layer in layers)]
    host = sum(layer.offloaded for layer in layers)
    found: list[Footprint] = []
    number = ITEM_BYTES[step.block.wide]  # a loss that stays

    def moment(where: str, gradients: int, kept: int, working: int) -> None:
        found.append(Footprint(parameters, optimizer, old + gradients, kept, working, shared, where, host))

    if t.reference:
        moment("reference", 0, 0, _reference_bytes(step))
        shared += number
    if t.sharded:
        moment("embedding", 0, 0, _gathered_bytes(step))
    for i, layer in enumerate(layers):
        going = layers[i - 1].offloaded if i and overlap else 0
        moment(f"forward of layer {i}", 0, before[i] + going, layer.forward)
    head, head_gradients, tied = _head_bytes(step)
    moment("head", 0, before[-1] + (layers[-1].offloaded if overlap else 0), head)
    shared += number
    behind = head_gradients + tied
    for i in reversed(config.layers):
        coming = layers[i - 1].offloaded if i else 0  # the layer before fetches what it offloaded
        moment(f"backward of layer {i}", behind, before[i] + coming, layers[i].backward)
        behind += layers[i].gradients
    if t.rank is None:
        embedding, kept = _embedding_bytes(step)
        moment("backward of the embedding", behind - tied, 0, embedding)
        behind += kept - tied
    if t.update:
        for group, working, freed in _update_bytes(step, groups):
            moment(f"update of {group if not group.isdigit() else f'layer {group}'}", behind, 0, working)
            behind -= freed
    return found


# ---- parts -----------------------------------------------------------------------------------------------------
def _kind(step: Step, layer: int) -> int:
    """The first layer of the same type and window, which stands for all of them."""
    config = step.block.config
    kinds = [(config.is_linear(i), config.window(i)) for i in config.layers]
    return kinds.index(kinds[layer])


def _standing(step: Step, groups: Mapping[str, Mapping[str, TensorSpec]]) -> tuple[int, int, int]:
    """Bytes of parameters, of optimizer states, and of gradients that lie there from the beginning."""
    t = step.training
    parameters = optimizer = old = 0
    for group, specs in groups.items():
        whole = sum(s.nbytes for s in specs.values())
        parameters += t.share(specs).nbytes if t.sharded else whole
        parameters += whole if t.reference and t.rank is None else 0
        trained = specs
        if t.rank is not None:
            trained = adapter_weights(step.block.config, t.rank, int(group)) if group.isdigit() else {}
            parameters += sum(s.nbytes for s in trained.values())
        if trained:
            optimizer += sum(s.nbytes for s in t.states(trained).values())
            dtype = next(iter(trained.values())).dtype
            count = t.count(trained) if t.zero < 2 else t.share(trained).shape[0]
            old += TensorSpec((count,), dtype).nbytes
    return parameters, optimizer, old if t.old_gradients else 0


@lru_cache(maxsize=4096)
def layer_bytes(recipe: Recipe, training: Training, layer: int, writes: Writes = write_layer) -> LayerBytes:
    """What a layer needs, written by `writes`."""
    block, config = recipe.block, recipe.block.config
    b = Builder("layer", 0, training.ranks)
    shape = TensorSpec((block.batch, block.tokens, config.hidden_size), block.dtype)
    angles = TensorSpec((1, block.tokens, 1, config.head_dim), block.dtype)
    cos, sin = b.input("cos", angles), b.input("sin", angles)
    shards = Shards(b, training, 0)
    adapters = adapter_weights(config, recipe.rank, layer) if recipe.rank is not None else None
    shards.declare("0", layer_weights(config, block.dtype, layer), adapters)
    x = b.compute(Empty(shape), cos, names=("x",))[0]
    writer = writes(b, recipe, layer, shards.weights("0", x), cos, sin)
    writer.sparse = True
    y = writer.forward(x)
    turned = b.compute(Empty(shape), y, names=("dy",))[0]  # the head's part: its input goes, a gradient comes
    writer.prefetch(turned)
    writer.weights = shards.weights("0", turned)
    dx = writer.backward(turned)
    shards.reduce("0", writer.grads)
    end = b.compute(Empty(TensorSpec((0,))), dx, names=("end",))[0]
    gradients = {f"gradient {name}": v for name, v in shards.gradients.items()}
    schedule = b.finish({"end": end, **gradients})
    live = live_bytes(schedule)
    standing = live[0]
    turn = next(
        i for i, step in enumerate(schedule.steps, 1) if any(v.name == turned.name for v in step.writes)
    )
    own = shards.held()
    saved = live[turn] - standing - 2 * shape.nbytes
    fetched = sum(s.output.nbytes for s in schedule.steps if isinstance(s, Copy) and s.tier == "device")
    return LayerBytes(saved, max(live[1:turn]) - standing, max(live[turn + 1 :]) - standing, own, fetched)


def _head_bytes(step: Step) -> tuple[int, int, int]:
    """Most bytes while the head runs, bytes of its gradients afterwards, and of that of a tied embedding."""
    block, t = step.block, step.training
    b = Builder("head", 0, t.ranks)
    labels = b.input("labels", TensorSpec((block.batch, block.tokens), "int64"))
    groups = parameter_groups(block)
    shards = Shards(b, t, 0)
    for group in ("embed", "head"):
        shards.declare(group, groups[group])
    shape = TensorSpec((block.batch, block.tokens, block.config.hidden_size), block.dtype)
    x = b.compute(Empty(shape), labels, names=("x",))[0]
    weights = dict(shards.weights("head", x))
    tied = "weight" not in weights
    if tied:
        weights["weight"] = shards.weights("embed", x)["weight"]
    head = HeadWriter(b, block, weights, t.rank, step.policy.head_tokens)
    head.sparse = True
    dx = head.forward_backward(x, labels)
    shards.reduce("head", head.grads)
    assert head.loss is not None
    outputs = {"dx": dx, "loss": head.loss, **{f"gradient {n}": v for n, v in shards.gradients.items()}}
    if tied and t.rank is None:
        outputs["tied"] = head.grads["weight"]
    live = live_bytes(b.finish(outputs))
    return max(live) - live[0], shards.held(), outputs["tied"].nbytes if "tied" in outputs else 0


def _gathered_bytes(step: Step) -> int:
    """Most bytes while a sharded embedding is gathered and used."""
    block, t = step.block, step.training
    b = Builder("embedding", 0, t.ranks)
    tokens = b.input("tokens", TensorSpec((block.batch, block.tokens), "int64"))
    shards = Shards(b, t, 0)
    shards.declare("embed", parameter_groups(block)["embed"])
    x = b.compute(Embed(), tokens, shards.weights("embed", tokens)["weight"], names=("x",))[0]
    live = live_bytes(b.finish({"x": x}))
    return max(live) - live[0]


def _embedding_bytes(step: Step) -> tuple[int, int]:
    """Most bytes of the embedding's backward pass, and what stays of its gradient."""
    block, t = step.block, step.training
    b = Builder("embedding", 0, t.ranks)
    tokens = b.input("tokens", TensorSpec((block.batch, block.tokens), "int64"))
    shards = Shards(b, t, 0)
    table = parameter_groups(block)["embed"]
    shards.declare("embed", table)
    shape = TensorSpec((block.batch, block.tokens, block.config.hidden_size), block.dtype)
    dx = b.compute(Empty(shape), tokens, names=("dx",))[0]
    tied = None
    if block.config.tie_word_embeddings:
        tied = b.compute(Empty(table["weight"]), tokens, names=("tied",))[0]
    weight = shards.weights("embed", dx)["weight"]
    made = b.compute(EmbedBackward(), dx, tokens, weight, names=("dw",))[0]
    if tied is not None:
        made = b.compute(Accumulate(), tied, made)[0]
    shards.reduce("embed", {"weight": made})
    live = live_bytes(b.finish({f"gradient {n}": v for n, v in shards.gradients.items()}))
    return max(live) - live[0], shards.held()


def _update_bytes(step: Step, groups: Mapping[str, Mapping[str, TensorSpec]]) -> list[tuple[str, int, int]]:
    """For every group that is updated: most bytes beside what stands, and bytes of gradients freed by it."""
    t, config = step.training, step.block.config
    known: dict[str, tuple[int, int]] = {}
    found = []
    for group, specs in groups.items():
        kind, adapters = group, None
        if group.isdigit():
            kind = f"layer {_kind(step, int(group))}"
            adapters = adapter_weights(config, t.rank, int(group)) if t.rank is not None else None
        if t.rank is not None and adapters is None:
            continue
        if kind not in known:
            known[kind] = _update_of(t, specs, adapters)
        found.append((group, *known[kind]))
    return found


def _update_of(
    t: Training, specs: Mapping[str, TensorSpec], adapters: Mapping[str, TensorSpec] | None
) -> tuple[int, int]:
    b = Builder("update", 0, t.ranks)
    start = b.input("start", TensorSpec((1,)))
    shards = Shards(b, t, 0)
    shards.declare("0", specs, adapters)
    trained = adapters or specs
    grads = {n: b.compute(Empty(s), start, names=(n,))[0] for n, s in trained.items()}
    shards.reduce("0", grads)
    held = shards.held()
    begun = b.compute(After(), start, *shards.gradients.values(), names=("begun",))[0]
    shards.update()
    schedule = b.finish({**shards.outputs, "begun": begun})
    live = live_bytes(schedule)
    turn = next(i for i, s in enumerate(schedule.steps, 1) if any(v.name == begun.name for v in s.writes))
    return max(live[turn:]) - live[0] - held, held


def _reference_bytes(step: Step) -> int:
    """Most bytes while the reference runs forward: a layer's forward pass without anything kept, or its head."""
    training = Training(zero=step.training.zero, ranks=step.training.ranks)
    most = 0
    for kind in {_kind(step, i) for i in step.block.config.layers}:
        recipe = step.recipe(kind)
        policy = recipe.policy if recipe.policy.kind == "stream" else LayerPolicy("recompute")
        plain = Recipe(recipe.block, policy, recipe.mlp_tiles, None, recipe.masked)
        most = max(most, layer_bytes(plain, training, kind).forward)
    head, _, _ = _head_bytes(step)
    return max(most, head)
