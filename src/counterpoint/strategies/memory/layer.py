"""A transformer layer's forward and backward pass under a memory policy, as steps of a schedule.

The operators, and what they save for the backward pass, are those of model/decoder.py, so that a schedule holds what
autograd would hold; `saved` uses the names of `cost.saved_tensors`. A policy decides what stays in between:

keep        everything.
recompute   the input x; the backward pass computes the layer again first.
stream      the input x (StreamBP, arXiv 2506.03077): keys and values of the whole sequence are made again, then chunk
            by chunk queries, attention to the prefix, feed-forward, and at once their gradients; the gradients of
            keys and values add up and go through their projections at the end.
offload     as keep, but buffers up to the ratio are copied to host memory and come back (ByteScale, 2502.21231).

Shapes: x (B, S, E); q, out (B, S, H, D); k, v (B, S, G, D); lse (B, S, H); weights (out, in).
"""

from __future__ import annotations

from dataclasses import dataclass

from counterpoint.kernels.attention import Add, Attend, AttendBackward
from counterpoint.kernels.mask import Area, AttentionMask
from counterpoint.kernels.norm import Rotate
from counterpoint.kernels.pointwise import (
    After,
    Empty,
    Multiply,
    MultiplyBackward,
    Silu,
    SiluBackward,
    Sum,
    Write,
)
from counterpoint.kernels.projection import View
from counterpoint.kernels.tokens import Run, Tokens
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.schedule import Value
from counterpoint.strategies.memory.cost import Block, check_policy, chunk_lengths, offloaded_tensors
from counterpoint.strategies.memory.operators import Operators, Values
from counterpoint.strategies.memory.policy import LayerPolicy


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a layer is computed. rank: of the LoRA adapters beside frozen weights; None trains the weights themselves.
    masked: attention computes every score and masks some, as with an explicit mask, instead of leaving out blocks."""

    block: Block
    policy: LayerPolicy
    mlp_tiles: int = 1
    rank: int | None = None
    masked: bool = False

    def __post_init__(self) -> None:
        check_policy(self.block, self.policy)


class LayerWriter(Operators):
    """Writes the two passes of one layer. After `backward`, `grads` holds the gradients of what is trained, by name."""

    def __init__(
        self, builder: Builder, recipe: Recipe, layer: int, weights: Values, cos: Value, sin: Value
    ) -> None:
        super().__init__(builder, recipe.block, weights, recipe.rank)
        self.recipe, self.cos, self.sin = recipe, cos, sin
        self.mask = AttentionMask(causal=True, window=self.config.window(layer))
        self.scale = self.config.head_dim**-0.5
        self.saved: Values = {}
        self._host: Values = {}

    # ---- the policies --------------------------------------------------------------------------------
    def forward(self, x: Value) -> Value:
        kind = self.recipe.policy.kind
        if kind == "stream":
            self.saved = {"x": x}
            return self._stream_forward(x)
        saved: Values = {}
        y = self._layer(x, saved)
        self.saved = saved if kind in ("keep", "offload") else {"x": x}
        if kind == "offload":
            gone = offloaded_tensors(self.block, self.recipe.policy.share, self.recipe.mlp_tiles)
            for name in (s.name for s in gone):
                self._host[name] = self.builder.copy(self.saved.pop(name), "host", "to_host")
        return y

    def prefetch(self, after: Value) -> None:
        """Begin to bring back what went to host memory, once `after` exists."""
        for name, value in self._host.items():
            ready = self.one(After(), value, after)
            self.saved[name] = self.builder.copy(ready, "device", "from_host")
        self._host = {}

    def backward(self, dy: Value) -> Value:
        self.prefetch(dy)
        if self.recipe.policy.kind == "stream":
            return self._stream_backward(dy, self.saved["x"])
        saved = self.saved
        if self.recipe.policy.kind == "recompute":
            saved = {}
            self._layer(self.saved["x"], saved)
        return self._layer_back(dy, saved)

    def _stream_forward(self, x: Value) -> Value:
        k, v = self._all_keys(x)
        spans = self.some(_spans(self.block.tokens, self.recipe.policy.chunks))
        if len(spans) == 1:
            return self._rows_forward(x, 0, self.block.tokens, k, v, {})
        y = self.one(Empty(x.spec), x, name="y")
        for a, b in spans:
            y = self.one(Write(a, b), y, self._rows_forward(self.rows(x, a, b), a, b, k, v, {}))
        return y

    def _stream_backward(self, dy: Value, x: Value) -> Value:
        k, v = self._all_keys(x)
        spans, wide = self.some(_spans(self.block.tokens, self.recipe.policy.chunks)), self.block.wide
        dx = self.one(Empty(x.spec), x, name="dx")
        dk, dv = (self.one(Empty(t.spec.cast(wide), zero=True), x, name=n) for t, n in ((k, "dk"), (v, "dv")))
        with self.pieces():
            for a, b in spans:
                saved: Values = {}
                y = self._rows_forward(self.rows(x, a, b), a, b, k, v, saved)
                d = self.one(After(), self.rows(dy, a, b), y)
                part, dkeys, dvalues = self._rows_back(d, saved, (a, b))
                dx = self.one(Write(a, b), dx, part)
                low, high = self._seen(a, b)
                dk = self.one(Add(((low, high),)), dk, dkeys)
                dv = self.one(Add(((low, high),)), dv, dvalues)
            for a, b in spans:
                saved = {}
                h = saved["h"] = self.norm(self.rows(x, a, b), "x", "input_layernorm", saved)
                self._keys(h, (a, b), saved)
                narrow_k, narrow_v = (self.cast(self.rows(g, a, b)) for g in (dk, dv))
                dh = self._keys_back(narrow_k, narrow_v, saved, (a, b))
                dx = self.one(Add(((a, b),)), dx, self.norm_back(dh, "x", "input_layernorm", saved))
        return dx

    def _all_keys(self, x: Value) -> tuple[Value, Value]:
        """Keys and values of the whole sequence, made chunk by chunk and without what their gradients would need."""
        spans = self.some(_spans(self.block.tokens, self.recipe.policy.chunks))
        k = v = None
        for a, b in spans:
            h = self.norm(self.rows(x, a, b), "x", "input_layernorm", {})
            part_k, part_v = self._keys(h, (a, b), {})
            if len(spans) == 1:
                return part_k, part_v
            if k is None or v is None:
                whole = part_k.spec.with_size(1, self.block.tokens)
                k, v = self.one(Empty(whole), x, name="k"), self.one(Empty(whole), x, name="v")
            k, v = self.one(Write(a, b), k, part_k), self.one(Write(a, b), v, part_v)
        assert k is not None and v is not None
        return k, v

    # ---- the layer -----------------------------------------------------------------------------------
    def _layer(self, x: Value, saved: Values) -> Value:
        everything = (0, self.block.tokens)
        self.builder.phase = "qkv"
        h = saved["h"] = self.norm(x, "x", "input_layernorm", saved)
        q = self._queries(h, everything, saved)
        k, v = self._keys(h, everything, saved)
        saved["k"], saved["v"] = k, v
        return self._close(x, self._attend(q, k, v, everything, saved), saved)

    def _layer_back(self, dy: Value, saved: Values) -> Value:
        everything = (0, self.block.tokens)
        dx, dq, dk, dv = self._close_back(dy, saved, everything)
        dh = self._queries_back(dq, saved, everything)
        dh = self.one(Sum(), dh, self._keys_back(self.cast(dk), self.cast(dv), saved, everything))
        return self.one(Sum(), dx, self.norm_back(dh, "x", "input_layernorm", saved))

    def _rows_forward(self, x: Value, a: int, b: int, k: Value, v: Value, saved: Values) -> Value:
        """Queries, attention and feed-forward of tokens a to b, given the keys and values of all."""
        low, high = self._seen(a, b)
        h = saved["h"] = self.norm(x, "x", "input_layernorm", saved)
        q = self._queries(h, (a, b), saved)
        saved["k"], saved["v"] = self.rows(k, low, high), self.rows(v, low, high)
        return self._close(x, self._attend(q, saved["k"], saved["v"], (a, b), saved), saved)

    def _rows_back(self, dy: Value, saved: Values, span: tuple[int, int]) -> tuple[Value, Value, Value]:
        dx, dq, dk, dv = self._close_back(dy, saved, span)
        part = self.norm_back(self._queries_back(dq, saved, span), "x", "input_layernorm", saved)
        return self.one(Sum(), dx, part), dk, dv

    def _close(self, x: Value, out: Value, saved: Values) -> Value:
        """What follows attention: its projection, and the feed-forward, each added to what came in."""
        self.builder.phase = "out"
        flat = self.one(View((out.spec.shape[2] * out.spec.shape[3],)), out)
        y = self.one(Sum(), x, self.linear("o_proj", flat, saved), name="y")
        self.builder.phase = "mlp"
        m = saved["m"] = self.norm(y, "y", "post_attention_layernorm", saved)
        return self.one(Sum(), y, self._mlp(m, saved), name="z")

    def _project_back(self, dz: Value, out: Value, saved: Values) -> tuple[Value, Value]:
        """(gradient of the residual stream, dout), out being what attention gave."""
        self.builder.phase = "mlp backward"
        dm = self._mlp_back(dz, saved)
        dy = self.one(Sum(), dz, self.norm_back(dm, "y", "post_attention_layernorm", saved), name="dy")
        self.builder.phase = "out backward"
        flat = self.one(View((out.spec.shape[2] * out.spec.shape[3],)), out)
        return dy, self.one(
            View(out.spec.shape[2:]), self.linear_back("o_proj", dy, flat, saved), name="dout"
        )

    def _close_back(
        self, dz: Value, saved: Values, span: tuple[int, int]
    ) -> tuple[Value, Value, Value, Value]:
        """(gradient of the residual stream, dq, dk, dv); those of attention in float32."""
        out = saved["out"]
        dy, dout = self._project_back(dz, out, saved)
        self.builder.phase = "attention backward"
        kernel = AttendBackward(self._areas(span), self.scale, has_out=True)
        inputs = (saved["q"], dout, saved["lse"], out, saved["k"], saved["v"])
        dq, dk, dv = self.builder.compute(kernel, *inputs, names=("dq", "dk", "dv"))
        self.builder.phase = "qkv backward"
        return dy, dq, dk, dv

    # ---- attention -----------------------------------------------------------------------------------
    def _seen(self, a: int, b: int) -> tuple[int, int]:
        """First and last (exclusive) key that the queries a to b see."""
        areas = self.mask.areas(Tokens((Run(a, b - a),)), Tokens((Run(0, b),)))
        return min(area.k_start for area in areas), b

    def _areas(self, span: tuple[int, int]) -> tuple[Area, ...]:
        (a, b), (low, high) = span, self._seen(*span)
        if self.recipe.masked:
            return (Area(0, b - a, 0, high - low),)
        return self.mask.areas(Tokens((Run(a, b - a),)), Tokens((Run(low, high - low),)))

    def _attend(self, q: Value, k: Value, v: Value, span: tuple[int, int], saved: Values) -> Value:
        self.builder.phase = "attention forward"
        kernel = Attend(self._areas(span), self.scale)
        out, lse = self.builder.compute(kernel, q, k, v, names=("out", "lse"))
        saved.update(q=q, out=out, lse=lse)
        return out

    def _queries(self, h: Value, span: tuple[int, int], saved: Values) -> Value:
        q = self._heads(self.linear("q_proj", h, saved), "q")
        if self.config.qk_norm:
            q = self.norm(q, "q_raw", "q_norm", saved)
        return self._turn(q, span)

    def _queries_back(self, dq: Value, saved: Values, span: tuple[int, int]) -> Value:
        dq = self._turn(self.cast(dq), span, back=True)
        if self.config.qk_norm:
            dq = self.norm_back(dq, "q_raw", "q_norm", saved)
        return self.linear_back("q_proj", self._flat(dq), saved["h"], saved)

    def _keys(self, h: Value, span: tuple[int, int], saved: Values) -> tuple[Value, Value]:
        k = self._heads(self.linear("k_proj", h, saved), "k")
        v = self._heads(self.linear("v_proj", h, saved), "v")
        if self.config.qk_norm:
            k = self.norm(k, "k_raw", "k_norm", saved)
        return self._turn(k, span), v

    def _keys_back(self, dk: Value, dv: Value, saved: Values, span: tuple[int, int]) -> Value:
        dk = self._turn(dk, span, back=True)
        if self.config.qk_norm:
            dk = self.norm_back(dk, "k_raw", "k_norm", saved)
        dh = self.linear_back("k_proj", self._flat(dk), saved["h"], saved)
        return self.one(Sum(), dh, self.linear_back("v_proj", self._flat(dv), saved["h"], saved))

    def _turn(self, x: Value, span: tuple[int, int], back: bool = False) -> Value:
        return self.one(Rotate(back), x, self.rows(self.cos, *span), self.rows(self.sin, *span))

    def _heads(self, x: Value, name: str) -> Value:
        d = self.config.head_dim
        return self.one(View((x.spec.shape[2] // d, d)), x, name=name)

    def _flat(self, x: Value) -> Value:
        return self.one(View((x.spec.shape[2] * x.spec.shape[3],)), x)

    # ---- feed-forward --------------------------------------------------------------------------------
    def _mlp(self, m: Value, saved: Values) -> Value:
        spans = self.some(_spans(m.spec.shape[1], self.recipe.mlp_tiles))
        if self.recipe.mlp_tiles == 1:
            return self._inner(m, saved)
        if len(spans) == 1:
            return self._inner(m, {})
        whole = self.one(Empty(m.spec), m, name="mlp")
        for a, b in spans:
            whole = self.one(Write(a, b), whole, self._inner(self.rows(m, a, b), {}))
        return whole

    def _mlp_back(self, dy: Value, saved: Values) -> Value:
        m = saved["m"]
        if self.recipe.mlp_tiles == 1:
            return self._inner_back(dy, m, saved)
        dm = self.one(Empty(m.spec), m, name="dm")
        with self.pieces():
            for a, b in self.some(_spans(m.spec.shape[1], self.recipe.mlp_tiles)):
                inside: Values = {}
                part = self.rows(m, a, b)
                d = self.one(After(), self.rows(dy, a, b), self._inner(part, inside))
                dm = self.one(Write(a, b), dm, self._inner_back(d, part, inside))
        return dm

    def _inner(self, m: Value, saved: Values) -> Value:
        gate = saved["gate"] = self.linear("gate_proj", m, saved)
        silu = saved["silu"] = self.one(Silu(), gate, name="silu")
        up = saved["up"] = self.linear("up_proj", m, saved)
        saved["product"] = self.one(Multiply(), silu, up, name="product")
        return self.linear("down_proj", saved["product"], saved)

    def _inner_back(self, dy: Value, m: Value, saved: Values) -> Value:
        d = self.linear_back("down_proj", dy, saved["product"], saved)
        dsilu, dup = self.builder.compute(
            MultiplyBackward(), d, saved["silu"], saved["up"], names=("dsilu", "dup")
        )
        dm = self.linear_back("up_proj", dup, m, saved)
        dgate = self.one(SiluBackward(), dsilu, saved["gate"], name="dgate")
        return self.one(Sum(), dm, self.linear_back("gate_proj", dgate, m, saved))


def _spans(tokens: int, pieces: int) -> list[tuple[int, int]]:
    """First and last (exclusive) token of each of `pieces` pieces."""
    spans, start = [], 0
    for length in chunk_lengths(tokens, pieces):
        spans.append((start, start + length))
        start += length
    return spans
