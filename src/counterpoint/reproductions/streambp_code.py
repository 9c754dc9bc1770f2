"""The streamed layer as StreamBP's published code runs it, for what it takes in memory.

It differs from the paper, and from our own streamed layer, in what is made anew for every chunk: the input norm, keys
and values of the whole prefix, with their graph, and keys and values repeated to as many heads as there are queries.
Autograd gives every slice of the sequence a gradient of the whole sequence's size. A chunk's graph is retained, and the
name that holds it is bound anew only when the next chunk's forward pass is done: then two of them exist. Weights'
gradients are added in their own dtype. (Repository of arXiv 2506.03077, transformers 4.51, read; nothing is copied.)
"""

from __future__ import annotations

from counterpoint.kernels.attention import Attend, AttendBackward
from counterpoint.kernels.kernel import TensorSpec
from counterpoint.kernels.pointwise import Accumulate, After, Empty, Sum, Write
from counterpoint.kernels.projection import View
from counterpoint.kernels.shape import FoldHeads, RepeatHeads
from counterpoint.schedule.schedule import Value
from counterpoint.strategies.memory.layer import LayerWriter
from counterpoint.strategies.memory.operators import Values


class PublishedStream(LayerWriter):
    """The backward pass of chunks of `chunk` tokens; with `sparse` the first one and the last two only."""

    chunk = 500

    def forward(self, x: Value) -> Value:
        self.saved = {"x": x}
        return self._layer(x, {})

    def backward(self, dy: Value) -> Value:
        x, tokens = self.saved["x"], self.block.tokens
        spans = [(a, min(a + self.chunk, tokens)) for a in range(0, tokens, self.chunk)]
        dx: Value | None = None
        graph: list[Value] = []
        for a, b in spans[:1] + spans[-2:] if self.sparse and len(spans) > 3 else spans:
            part, graph = self._chunk(self.rows(x, 0, b), dy, a, b, graph)
            if dx is None:
                dx = self.one(Empty(x.spec, zero=True), x, name="dx")
            dx = self.one(Write(0, b), dx, part)
        assert dx is not None
        return dx

    def _chunk(self, x: Value, dy: Value, a: int, b: int, graph: list[Value]) -> tuple[Value, list[Value]]:
        """The gradient of the prefix from one chunk, and what the chunk's graph holds; `graph` is the one before."""
        saved: Values = {}
        c = self.config
        times = c.num_attention_heads // c.num_key_value_heads
        mask = self.one(Empty(TensorSpec((self.block.batch, b - a, 1, b), self.block.dtype)), x, name="mask")
        h = saved["h"] = self.norm(x, "x", "input_layernorm", saved)
        k, v = self._keys(h, (0, b), saved)
        k, v = (self.one(RepeatHeads(times), t, name=n) for t, n in ((k, "k"), (v, "v")))
        own = {"h": self.rows(h, a, b)}
        q = self._queries(own["h"], (a, b), own)
        areas = self._areas((a, b))
        out, lse = self.builder.compute(Attend(areas, self.scale), q, k, v, names=("out", "lse"))
        own.update(q=q, k=k, v=v, out=out, lse=lse)
        y = self._close(self.rows(x, a, b), out, own)
        d = self.one(After(), self.rows(dy, a, b), y, mask, *graph)
        dm = self._mlp_back(d, own)
        dpart = self.one(Sum(), d, self.norm_back(dm, "y", "post_attention_layernorm", own))
        flat = self.one(View((out.spec.shape[2] * out.spec.shape[3],)), out)
        dout = self.one(View(out.spec.shape[2:]), self.linear_back("o_proj", dpart, flat, own))
        kernel = AttendBackward(areas, self.scale, has_out=True, narrow=True)
        dq, dk, dv = self.builder.compute(kernel, q, dout, lse, out, k, v, names=("dq", "dk", "dv"))
        dh = self._spread(self._queries_back(dq, own, (a, b)), x, a, b)
        dk, dv = self.one(FoldHeads(times), dk, name="dk"), self.one(FoldHeads(times), dv, name="dv")
        dh = self.one(Sum(), dh, self._keys_back(dk, dv, saved, (0, b)))
        residual = self._spread(dpart, x, a, b)
        graph = list({**{f"own {n}": t for n, t in own.items()}, **saved}.values())
        return self.one(Sum(), residual, self.norm_back(dh, "x", "input_layernorm", saved)), [*graph, mask]

    def _spread(self, part: Value, like: Value, a: int, b: int) -> Value:
        """A gradient of the whole prefix that is zero outside the slice."""
        return self.one(Write(a, b), self.one(Empty(like.spec, zero=True), like, name="slice"), part)

    def gradient(self, name: str, part: Value) -> None:
        old = self.grads.get(name)
        self.grads[name] = part if old is None else self.one(Accumulate(), old, part)
