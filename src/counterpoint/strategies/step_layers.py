"""A layer of a training step, forward and backward: modules of the model, and between them attention's own schedule.

What a module saves is one value, as large as what `cost.saved_tensors` lists of its part; under an offloading policy
what leaves is a value of its own. Layers of linear attention differ in what their modules do and in what attention is.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from functools import cached_property

from counterpoint.kernels.attention import accumulator
from counterpoint.kernels.kernel import TensorSpec
from counterpoint.kernels.pointwise import After, Empty
from counterpoint.model.work import LAYER_PARTS, Part, model_parts
from counterpoint.schedule.schedule import Schedule, Value
from counterpoint.strategies.memory.cost import Block, kept_tensors, offloaded_tensors
from counterpoint.strategies.memory.layers import layer_parts
from counterpoint.strategies.memory.policy import LayerPolicy
from counterpoint.strategies.sequence.attention import backward_schedule, forward_schedule
from counterpoint.strategies.sequence.halo import halo_range, halo_schedule
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.strategies.step_modules import Modules, Values, opaque

VALUES = ("q", "k", "v", "g", "out", "lse", "o")  # of the saved tensors: what attention is given and gives


class SoftmaxLayer:
    """Writes layers whose tokens lie in `layout`; `layer` stands for those of its type."""

    def __init__(self, modules: Modules, layout: SequenceLayout, layer: int) -> None:
        self.modules, self.step, self.layout = modules, modules.step, layout
        self.local = layout.local_tokens(modules.place)
        norm = "fused" if self.step.overlapped else "composed"
        self.block = Block(self.step.model, 1, self.local, self.step.dtype, norm).at(layer)
        self.parts = self._parts(layer)
        self.size = sum(self.parts[part].parameters for part in LAYER_PARTS)
        self.hidden = TensorSpec((1, self.local, self.step.model.hidden_size), self.step.dtype)

    # ---- the passes --------------------------------------------------------------------------------
    def forward(
        self, layer: int, x: Value, weights: Value, gone: Container[str] = (), again: bool = False
    ) -> tuple[Value, Values]:
        """The layer's output, and what its backward pass needs, by name. gone: saved tensors that are to leave."""
        where = f"layer {layer} {'again ' if again else ''}"
        kept = self._module("qkv", self._given | self._leaving, (x, weights), where, gone)
        self._receive(kept, where)
        made = self._attend(layer, "forward", kept, where)
        behind = self._module("out", {"h": self.hidden}, (made["out"], x, weights), where, gone)
        last = self._module("mlp", {"y": self.hidden}, (behind.pop("h"), weights), where, gone)
        return last.pop("y"), {**kept, **made, **behind, **last}

    def backward(self, layer: int, dy: Value, kept: Values, weights: Value) -> tuple[Value, list[Value]]:
        """(gradient of the layer's input, those of its parameters)."""
        where = f"layer {layer} "
        grads: list[Value] = []

        def module(part: str, made: Iterable[TensorSpec], *inputs: Value) -> list[Value]:
            saved = [kept[name] for name in (f"saved {part}", f"away {part}") if name in kept]
            again = self.parts[part].forward if part == "mlp" and self.step.memory.mlp_tiles > 1 else ()
            specs = (*made, self.modules.gradient(self.parts[part]))
            *values, grad = self.modules.module(
                f"{part} backward",
                again + self.parts[part].backward,
                specs,
                *inputs,
                *saved,
                weights,
                where=where,
            )
            grads.append(grad)
            return values

        (dh,) = module("mlp", (self.hidden,), dy)
        (dout,) = module("out", (kept["out"].spec,), dh, kept["out"])
        made = self._attend(layer, "backward", {**kept, "dout": dout}, where)
        given = [made[f"d{name}"] for name in self._given if f"d{name}" in made]
        (dx,) = module("qkv", (self.hidden,), *given, *self._return(given[0], where), dh)
        return dx, grads

    def gone(self, policy: LayerPolicy) -> set[str]:
        """Names of the saved tensors that go to host memory."""
        if policy.kind != "offload":
            return set()
        return {s.name for s in offloaded_tensors(self.block, policy.share, self.step.memory.mlp_tiles)}

    def _module(
        self,
        part: str,
        made: dict[str, TensorSpec],
        inputs: tuple[Value, ...],
        where: str,
        gone: Container[str],
    ) -> Values:
        """What a module makes, and as "saved ..." and "away ..." what it keeps for its backward pass."""
        sizes = {f"saved {part}": 0, f"away {part}": 0}
        for name, nbytes in self._saved[part]:
            sizes[f"{'away' if name in gone else 'saved'} {part}"] += nbytes
        specs = {**made, **{name: opaque(nbytes) for name, nbytes in sizes.items() if nbytes}}
        operators = self.parts[part].forward
        values = self.modules.module(
            part, operators, tuple(specs.values()), *inputs, where=where, names=tuple(specs)
        )
        return dict(zip(specs, values, strict=True))

    @cached_property
    def _saved(self) -> dict[str, list[tuple[str, int]]]:
        """(name, bytes) of what each module saves beside the values that attention is given and gives."""
        found: dict[str, list[tuple[str, int]]] = {part: [] for part in LAYER_PARTS}
        kept, part = kept_tensors(self.block, self.step.memory.mlp_tiles), "qkv"
        names = {s.name for s in kept}
        for s in kept:
            if s.part in ("mlp_norm", "mlp"):
                part = "mlp"
            elif s.name.split(".")[0] in ("out", "o"):
                part = "out"
            # where a convolution is, keys and values lie in what it gave
            inside = (
                sum(self._given[name].nbytes for name in ("k", "v") if name not in names)
                if s.name == "mixed"
                else 0
            )
            if s.name not in VALUES:
                found[part].append((s.name, s.nbytes - inside))
        return found

    # ---- what differs between types of layers ------------------------------------------------------
    def _parts(self, layer: int) -> dict[str, Part]:
        return model_parts(self.step.model, self.local, self.step.dtype)

    @cached_property
    def _given(self) -> dict[str, TensorSpec]:
        """What attention is given."""
        m, dtype = self.step.model, self.step.dtype
        q = TensorSpec((1, self.local, m.num_attention_heads, m.head_dim), dtype)
        kv = TensorSpec((1, self.local, m.num_key_value_heads, m.head_dim), dtype)
        return {"q": q, "k": kv, "v": kv}

    @property
    def _leaving(self) -> dict[str, TensorSpec]:
        """What other ranks are given a part of."""
        return {}

    def _schedule(self, layer: int, which: str) -> Schedule:
        write = forward_schedule if which == "forward" else backward_schedule
        return write(self.step.attention(layer), self.modules.place)

    def _attend(self, layer: int, which: str, known: Values, where: str) -> Values:
        schedule = self._schedule(layer, which)
        return self.modules.inline(
            f"attention {which}", schedule, {v.name: known[v.name] for v in schedule.inputs}, where
        )

    def _receive(self, kept: Values, where: str) -> None:
        """What other ranks give a part of reaches this one before it attends."""

    def _return(self, after: Value, where: str) -> list[Value]:
        """Gradients of that part go back, once attention is differentiated; returns what comes."""
        return []


class LinearLayer(SoftmaxLayer):
    """Writes layers of linear attention; `layout` keeps tokens in order."""

    def _parts(self, layer: int) -> dict[str, Part]:
        return layer_parts(self.block, layer)

    @cached_property
    def _given(self) -> dict[str, TensorSpec]:
        shape, wide = self.step.linear_shape, accumulator(self.step.dtype)
        keys = TensorSpec((1, self.local, shape.heads, shape.key_dim), self.step.dtype)
        given = {"q": keys, "k": keys, "v": keys.with_size(3, shape.value_dim)}
        if shape.decay_width:
            given["g"] = TensorSpec((1, self.local, shape.heads, shape.decay_width), wide)
        return given

    def _schedule(self, layer: int, which: str) -> Schedule:
        return self.step.states().schedule(which, self.modules.place)  # type: ignore[arg-type]

    @property
    def _leaving(self) -> dict[str, TensorSpec]:
        linear = self.step.model.linear
        assert linear is not None
        if linear.conv_kernel_dim < 2 or self.step.sequence_size == 1:
            return {}
        return {"channels": TensorSpec((1, self.local, linear.channels), self.step.dtype)}

    def _receive(self, kept: Values, where: str) -> None:
        if self._leaving:
            channels = kept.pop("channels")
            made = self._halo("forward", {"x": channels}, where, "halo")
            if "halo" in made:
                (kept["q"],) = self.modules.b.compute(After(), kept["q"], made["halo"], names=[f"{where}q"])

    def _return(self, after: Value, where: str) -> list[Value]:
        if not self._leaving:
            return []
        linear = self.step.model.linear
        assert linear is not None
        start, stop = halo_range(self.layout, linear.conv_kernel_dim, self.modules.place)
        given: Values = {}
        if stop > start:
            spec = self._leaving["channels"].with_size(1, stop - start)
            (given["dhalo"],) = self.modules.b.compute(Empty(spec), after, names=[f"{where}dhalo"])
        return list(self._halo("backward", given, where, "halo backward").values())

    def _halo(self, which: str, known: Values, where: str, what: str) -> Values:
        linear = self.step.model.linear
        assert linear is not None
        spec = TensorSpec((1, 0, linear.channels), self.step.dtype)
        schedule = halo_schedule(spec, self.layout, linear.conv_kernel_dim, self.modules.place, which)  # type: ignore[arg-type]
        phase = "qkv" if which == "forward" else "qkv backward"
        return self.modules.inline(
            phase, schedule, {v.name: known[v.name] for v in schedule.inputs}, where, what
        )
