"""What a training step of a decoder costs, operator by operator: the same modules as model/decoder.py, for costing.

S tokens of this rank, E hidden size, F intermediate size, V vocabulary, e bytes of an element. A part of the model is
a list of operators forward and one backward. Attention itself is missing: it is a schedule of its own
(strategies/sequence). The flops of the matmuls add up to those of `ModelConfig.flops_per_token`. What is kept for the
backward pass is in strategies/memory/cost.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from counterpoint.kernels.kernel import ITEM_BYTES, Work
from counterpoint.kernels.module import Operator
from counterpoint.model.config import ModelConfig

LAYER_PARTS = ("qkv", "out", "mlp")  # in the order of the forward pass
HEAD_TOKENS = 1024  # tokens whose logits exist at a time (model/loss.py)
ADAMW_FLOPS = 12  # per parameter: two moments, bias corrections, decay, root, division, update


@dataclass(frozen=True, slots=True)
class Part:
    """Operators of one part of the model, forward and backward, and how many parameters it has."""

    forward: tuple[Operator, ...]
    backward: tuple[Operator, ...]
    parameters: int


def model_parts(config: ModelConfig, tokens: int, dtype: str = "float32") -> dict[str, Part]:
    """The parts of the model for `tokens` tokens: embedding; qkv, out and mlp of one layer; head."""
    m = _Maker(tokens, dtype)
    h, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    bias, d = config.attention_bias, config.head_dim
    head_norm = [m.norm("qk_norm", q), m.norm("qk_norm", kv)] if config.qk_norm else []
    qkv = [
        m.norm("input_layernorm", h),
        m.linear("q_proj", h, q, bias),
        m.linear("k_proj", h, kv, bias),
        m.linear("v_proj", h, kv, bias),
        *head_norm,
        m.rope("rope", q),
        m.rope("rope", kv),
    ]
    out = [m.linear("o_proj", q, h, config.output_bias), m.add("residual", h)]
    mlp = [
        m.norm("post_attention_layernorm", h),
        m.linear("gate_proj", h, f, config.mlp_bias),
        m.linear("up_proj", h, f, config.mlp_bias),
        m.gate("silu", f),
        m.linear("down_proj", f, h, config.mlp_bias),
        m.add("residual", h),
    ]
    head = [m.norm("norm", h)]
    chunks = [min(HEAD_TOKENS, tokens - a) for a in range(0, tokens, HEAD_TOKENS)]
    for count in chunks:
        part = _Maker(count, dtype)
        head += [part.linear("lm_head", h, v, False), part.loss("cross_entropy", v)]
    again = _forward(head[1:])  # the logits of a chunk are computed again in its backward pass
    return {
        "embedding": Part((m.lookup("embed_tokens", h),), (m.scatter("embed_tokens", h, v),), v * h),
        "qkv": Part(_forward(qkv), _backward(qkv), h + (h + bias) * (q + 2 * kv) + 2 * d * config.qk_norm),
        "out": Part(_forward(out), _backward(out), (q + config.output_bias) * h),
        "mlp": Part(_forward(mlp), _backward(mlp), h + 3 * h * f + config.mlp_bias * (2 * f + h)),
        "head": Part(
            _forward(head), again + _backward(head), h + (0 if config.tie_word_embeddings else v * h)
        ),
    }


def optimizer_work(parameters: int) -> tuple[Operator, ...]:
    """AdamW on so many float32 parameters: reads weight, gradient and two moments, writes all but the gradient."""
    work = Work(ADAMW_FLOPS * parameters, 16 * parameters, 12 * parameters)
    return (Operator("adamw", "elementwise", work),)


def clip_work(parameters: int) -> tuple[Operator, ...]:
    """The norm of so many float32 gradients, and their scaling."""
    norm = Operator("norm", "elementwise", Work(2 * parameters, 4 * parameters, 0))
    return norm, Operator("scale", "elementwise", Work(parameters, 4 * parameters, 4 * parameters))


def moved(name: str, nbytes: int) -> tuple[Operator, ...]:
    """One pass over so many bytes: read and written."""
    return (Operator(name, "elementwise", Work(0, nbytes, nbytes)),)


# ---- helpers -----------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Pair:
    forward: tuple[Operator, ...]
    backward: tuple[Operator, ...]


def _forward(pairs: Iterable[_Pair]) -> tuple[Operator, ...]:
    return tuple(o for pair in pairs for o in pair.forward)


def _backward(pairs: list[_Pair]) -> tuple[Operator, ...]:
    return tuple(o for pair in reversed(pairs) for o in pair.backward)


@dataclass(frozen=True, slots=True)
class _Maker:
    """Operators for so many tokens. Elementwise ones count the passes that eager PyTorch makes over memory."""

    tokens: int
    dtype: str

    @property
    def item(self) -> int:
        return ITEM_BYTES[self.dtype]

    def linear(self, name: str, inner: int, outer: int, bias: bool) -> _Pair:
        """Y = X W^T + b; backward dX = dY W and dW = dY^T X, which is added to what is there."""
        s, e = self.tokens, self.item
        x, w, y = s * inner * e, inner * outer * e, s * outer * e
        flops = 2 * s * inner * outer
        backward = [
            self._op(f"{name} dX", "matmul", flops, y + w, x),
            self._op(f"{name} dW", "matmul", flops, y + x, w),
        ]
        if bias:
            backward.append(self._op(f"{name} db", "elementwise", s * outer, y, outer * e))
        return _Pair((self._op(name, "matmul", flops, x + w + bias * outer * e, y),), tuple(backward))

    def norm(self, name: str, width: int) -> _Pair:
        """RMSNorm: square, mean, root, scale, weight."""
        return self._elementwise(name, width, (4, 2, 2), (8, 4, 2))

    def rope(self, name: str, width: int) -> _Pair:
        """x cos + rotate(x) sin: two products, a negation, a joining and a sum."""
        return self._elementwise(name, width, (3, 6, 5), (3, 6, 5))

    def add(self, name: str, width: int) -> _Pair:
        return self._elementwise(name, width, (1, 2, 1), (1, 2, 1))

    def gate(self, name: str, width: int) -> _Pair:
        """silu(g) u: two passes; backward three products and silu's derivative."""
        return self._elementwise(name, width, (5, 3, 2), (10, 6, 3))

    def loss(self, name: str, vocabulary: int) -> _Pair:
        """Cross entropy over float32 logits: the logarithm of the softmax; backward its gradient."""
        n = self.tokens * vocabulary
        return _Pair(
            (Operator(name, "elementwise", Work(5 * n, 8 * n, 4 * n)),),
            (Operator(f"{name} backward", "elementwise", Work(3 * n, 8 * n, 4 * n)),),
        )

    def lookup(self, name: str, width: int) -> Operator:
        n = self.tokens * width * self.item
        return self._op(name, "elementwise", 0, n, n)

    def scatter(self, name: str, width: int, vocabulary: int) -> Operator:
        """Gradient of a look-up: rows of a table of zeros."""
        n = self.tokens * width * self.item
        return self._op(f"{name} backward", "elementwise", 0, 2 * n, n + vocabulary * width * self.item)

    def _elementwise(
        self, name: str, width: int, forward: tuple[int, int, int], backward: tuple[int, int, int]
    ) -> _Pair:
        """(flops, reads, writes) per element, forward and backward."""
        n = self.tokens * width
        a, b = (
            self._op(title, "elementwise", flops * n, reads * n * self.item, writes * n * self.item)
            for title, (flops, reads, writes) in ((name, forward), (f"{name} backward", backward))
        )
        return _Pair((a,), (b,))

    def _op(self, name: str, operator: str, flops: int, read: int, written: int) -> Operator:
        return Operator(name, operator, Work(flops, read, written), self.dtype)
