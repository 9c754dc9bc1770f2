"""A layer of linear attention, forward and backward, under a memory policy: the operators of model/linear.py.

Between h, the normed input, and the projection o of the output: projections, short convolution, feature maps, log
decays, the states' own schedule (strategies/sequence/linear.py, of a single rank), a norm per head and a gate.

Shapes: h (B, S, C); q, k (B, S, H, D); v, out (B, S, H, E); log decays g (B, S, H, 1 or D).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from counterpoint.kernels.mixer import (
    Convolve,
    ConvolveBackward,
    EluBackward,
    EluPlusOne,
    ExpandHeads,
    Join,
    LogSigmoid,
    LogSigmoidBackward,
    PadBefore,
    Rates,
    Scale,
)
from counterpoint.kernels.pointwise import Multiply, MultiplyBackward, Silu, SiluBackward, Sum
from counterpoint.kernels.projection import View
from counterpoint.kernels.shape import Cast, TakeHeads
from counterpoint.model.linear_config import TEMPERATURE
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.schedule import Value
from counterpoint.strategies.memory.layer import LayerWriter, Recipe
from counterpoint.strategies.memory.operators import Values
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.strategies.sequence.linear import LinearProblem, parse_linear
from counterpoint.strategies.sequence.linear_builder import LinearShape


class LinearLayerWriter(LayerWriter):
    """Writes the two passes of a layer of linear attention."""

    def __init__(
        self, builder: Builder, recipe: Recipe, layer: int, weights: Values, cos: Value, sin: Value
    ) -> None:
        super().__init__(builder, recipe, layer, weights, cos, sin)
        assert self.config.linear is not None
        self.shape = s = self.config.linear
        block = self.block
        states, layout = parse_linear("states"), SequenceLayout("contiguous", block.tokens, 1)
        shape = LinearShape(
            block.batch, s.num_heads, s.key_head_dim, s.value_head_dim, s.decay_form, block.dtype  # type: ignore[arg-type]
        )  # fmt: skip
        self.problem = LinearProblem(shape, layout, states, states)

    def _layer(self, x: Value, saved: Values) -> Value:
        self.builder.phase = "qkv"
        h = saved["h"] = self.norm(x, "x", "input_layernorm", saved)
        q, k, v = self._projected(h, saved)
        q, k = self._feature(q), self._feature(k)
        q = self.one(Scale(self.shape.key_head_dim**-0.5), q)
        given = {"q": self._per_head(q), "k": self._per_head(k), "v": self._per_head(v)}
        given |= self._decays(h, saved)
        saved["q"] = given["q"]
        if self.shape.feature_map != "identity" or not self.shape.conv_kernel_dim:
            saved["k"] = given["k"]  # else it lies in what the convolution gave, as v does
        if not self.shape.conv_kernel_dim:
            saved["v"] = given["v"]
        self.builder.phase = "attention forward"
        out = self._states("forward", given)["out"]
        self.builder.phase = "out"
        return self._close(x, self._gated(self.norm(out, "o", "o_norm", saved), h, saved), saved)

    def _layer_back(self, dy: Value, saved: Values) -> Value:
        gate = self.shape.output_gate
        dx, dout = self._project_back(dy, saved["gated" if gate else "normed"], saved)
        h, parts = saved["h"], []
        if gate:
            dnormed, dsilu = self.builder.compute(
                MultiplyBackward(), dout, saved["normed"], saved["out_silu"], names=("dnormed", "dsilu")
            )
            dgate = self.one(SiluBackward(), dsilu, saved["out_gate"], name="dgate")
            parts.append(self.linear_back("g_proj", self._flat(dgate), h, saved))
            dout = dnormed
        dout = self.norm_back(dout, "o", "o_norm", saved)
        given = {"dout": dout, **self._mixed(saved)}
        self.builder.phase = "attention backward"
        made = self._states("backward", given)
        self.builder.phase = "qkv backward"
        if self.shape.decay in ("scalar", "vector"):
            parts.append(self._decays_back(made["dg"], h, saved))
        parts += self._projected_back(made["dq"], made["dk"], made["dv"], h, saved)
        dh = parts[0]
        for part in parts[1:]:
            dh = self.one(Sum(), dh, part)
        return self.one(Sum(), dx, self.norm_back(dh, "x", "input_layernorm", saved))

    def _states(self, which: Literal["forward", "backward"], given: Values) -> Values:
        """Attention of this rank's own sequences, which no other rank has a part of."""
        return self.builder.inline(self.problem.schedule(which, 0), given, ranks=(self.builder.rank,))

    # ---- queries, keys and values --------------------------------------------------------------------
    def _projected(self, h: Value, saved: Values) -> tuple[Value, Value, Value]:
        """(B, S, H D), (B, S, H D), (B, S, H E): projected, and convolved if the model does that."""
        q, k, v = (self.linear(f"{name}_proj", h, saved) for name in "qkv")
        if self.shape.conv_kernel_dim:
            joined = self.one(Join(), q, k, v, name="joined")
            saved["padded"] = self.one(PadBefore(self.shape.conv_kernel_dim - 1), joined, name="padded")
            kernel = Convolve()
            saved["convolved"] = self.one(
                kernel, saved["padded"], self.weights["conv_weight"], name="convolved"
            )
            saved["mixed"] = self.one(Silu(), saved["convolved"], name="mixed")
            return self._split(saved["mixed"])
        if self.shape.feature_map != "identity":
            saved["q_raw"], saved["k_raw"] = q, k
        return q, k, v

    def _projected_back(self, dq: Value, dk: Value, dv: Value, h: Value, saved: Values) -> list[Value]:
        """Gradients of h through the projections, from those of q, k and v with heads apart."""
        conv = bool(self.shape.conv_kernel_dim)
        q_raw, k_raw = (self._split(saved["mixed"]) if conv else (saved.get("q_raw"), saved.get("k_raw")))[:2]
        dq = self.one(Scale(self.shape.key_head_dim**-0.5), self._flat(dq))
        grads = [self._feature_back(dq, q_raw), self._feature_back(self._flat(dk), k_raw), self._flat(dv)]
        if conv:
            joined = self.one(Join(), *grads, name="dmixed")
            d = self.one(SiluBackward(), joined, saved["convolved"], name="dconvolved")
            trained = self.rank is None
            kernel, inputs = ConvolveBackward(trained), (d, saved["padded"], self.weights["conv_weight"])
            made = self.builder.compute(kernel, *inputs, names=("djoined", "dw")[: 1 + trained])
            if trained:
                self.gradient("conv_weight", made[1])
            grads = list(self._split(made[0]))
        return [
            self.linear_back(f"{name}_proj", grad, h, saved) for name, grad in zip("qkv", grads, strict=True)
        ]

    def _mixed(self, saved: Values) -> Values:
        """What attention saw, from what was saved."""
        found = {"q": saved["q"]}
        if self.shape.conv_kernel_dim:
            _, k, v = self._split(saved["mixed"])
            found |= {"k": saved.get("k") or self._per_head(k), "v": self._per_head(v)}
        else:
            found |= {"k": saved["k"], "v": saved["v"]}
        if "rates" in saved:
            found["g"] = self._everywhere(saved["rates"])
        if "g" in saved:
            found["g"] = saved["g"]
        return found

    def _split(self, joined: Value) -> tuple[Value, Value, Value]:
        keys = self.shape.num_heads * self.shape.key_head_dim
        ends = (0, keys, 2 * keys, self.shape.channels)
        q, k, v = (self.one(TakeHeads(a, b), joined) for a, b in pairwise(ends))
        return q, k, v

    def _feature(self, x: Value) -> Value:
        kind = self.shape.feature_map
        return x if kind == "identity" else self.one(Silu() if kind == "silu" else EluPlusOne(), x)

    def _feature_back(self, dy: Value, x: Value | None) -> Value:
        kind = self.shape.feature_map
        if kind == "identity":
            return dy
        assert x is not None
        return self.one(SiluBackward() if kind == "silu" else EluBackward(), dy, x)

    def _per_head(self, x: Value) -> Value:
        heads = self.shape.num_heads
        return self.one(View((heads, x.spec.shape[2] // heads)), x)

    # ---- decays --------------------------------------------------------------------------------------
    def _decays(self, h: Value, saved: Values) -> Values:
        """{"g": log decays} in the accumulator's dtype; nothing where there are none."""
        s, wide = self.shape, self.problem.shape.state.dtype
        if s.decay == "none":
            return {}
        if s.decay == "retention":
            saved["rates"] = self.one(Rates(s.rates, wide), h, name="rates")
            return {"g": self._everywhere(saved["rates"])}
        x = h
        if s.decay == "vector":
            x = saved["decay_down"] = self.linear("decay_down", h, saved)
        logits = self.linear("decay_proj", x, saved)
        if logits.spec.dtype != "float32":
            logits = self.one(Cast("float32"), logits)
        saved["decay"] = logits
        keeps = self.block.norm == "composed"
        made = self.builder.compute(LogSigmoid(keeps), logits, names=("log", "buffer")[: 1 + keeps])
        if keeps:
            saved["decay.buffer"] = made[1]
        g = self.one(Scale(1 / TEMPERATURE), made[0], name="g")
        if wide != "float32":
            g = self.one(Cast(wide), g)
        saved["g"] = self._per_head(g)
        return {"g": saved["g"]}

    def _decays_back(self, dg: Value, h: Value, saved: Values) -> Value:
        """The gradient of h through the decays."""
        d = self._flat(dg)
        if d.spec.dtype != "float32":
            d = self.one(Cast("float32"), d)
        buffer = [saved["decay.buffer"]] if "decay.buffer" in saved else []
        d = self.one(LogSigmoidBackward(), self.one(Scale(1 / TEMPERATURE), d), saved["decay"], *buffer)
        d = self.cast(d)
        if self.shape.decay == "scalar":
            return self.linear_back("decay_proj", d, h, saved)
        d = self.linear_back("decay_proj", d, saved["decay_down"], saved)
        return self.linear_back("decay_down", d, h, saved)

    def _everywhere(self, rates: Value) -> Value:
        return self.one(ExpandHeads(self.block.batch, self.block.tokens), rates)

    # ---- output --------------------------------------------------------------------------------------
    def _gated(self, normed: Value, h: Value, saved: Values) -> Value:
        saved["normed"] = normed
        if not self.shape.output_gate:
            return normed
        saved["out_gate"] = self._per_head(self.linear("g_proj", h, saved))
        saved["out_silu"] = self.one(Silu(), saved["out_gate"], name="silu")
        saved["gated"] = self.one(Multiply(), normed, saved["out_silu"], name="gated")
        return saved["gated"]
