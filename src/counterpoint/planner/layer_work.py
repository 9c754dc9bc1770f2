"""What the layers of a model cost apart from attention itself, by layer type: matrix products, norms, memory kept.

Everything is per token of one rank with whole weights (data or sequence parallelism). Matrix products are those of
`model.decoder`; a backward pass does each twice (for the input and for the weight). What layers of linear attention do
and save is read off their schedule (strategies/memory).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from counterpoint.cluster.device import Device, WorkClass
from counterpoint.kernels.kernel import ITEM_BYTES
from counterpoint.model.config import ModelConfig
from counterpoint.strategies.memory.cost import Block, saved_tensors
from counterpoint.strategies.memory.layers import layer_parts

MANY = 4096  # tokens of a sequence over which what it adds once is spread


@dataclass(frozen=True, slots=True)
class LayerKind:
    """A type of layer, and how far its queries see (None: all tokens before them)."""

    type: str = "full_attention"
    window: int | None = None

    @property
    def label(self) -> str:
        return self.type if self.window is None else f"{self.type} {self.window}"

    def pairs(self, length: int) -> int:
        """(query, key) pairs that see each other in a causal sequence of `length` tokens; none in linear attention."""
        if self.type == "linear_attention":
            return 0
        w = length if self.window is None else min(self.window, length)
        return w * (w + 1) // 2 + (length - w) * w


def layer_kinds(config: ModelConfig) -> dict[LayerKind, int]:
    """How many layers of each kind the model has."""
    kinds: Counter[LayerKind] = Counter()
    for layer in config.layers:
        if config.is_linear(layer):
            kinds[LayerKind("linear_attention")] += 1
            continue
        window = config.window(layer)
        kinds[LayerKind("full_attention" if window is None else "sliding_attention", window)] += 1
    return dict(kinds)


@dataclass(frozen=True, slots=True)
class Operation:
    """A kernel over some tokens: floating-point operations and bytes moved, and how often it runs."""

    operator: WorkClass
    flops: float
    nbytes: float
    times: int = 1


def product(tokens: int, inner: int, outer: int, dtype: str, times: int = 1) -> Operation:
    """(tokens, inner) times (inner, outer)."""
    moved = ITEM_BYTES[dtype] * (tokens * inner + inner * outer + tokens * outer)
    return Operation("matmul", 2.0 * tokens * inner * outer, moved, times)


def layer_operations(config: ModelConfig, tokens: int, dtype: str) -> list[Operation]:
    """The forward pass of a softmax layer without attention: products, and what goes over the hidden state."""
    h, f, e = config.hidden_size, config.intermediate_size, ITEM_BYTES[dtype]
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return [
        product(tokens, h, q, dtype),
        product(tokens, h, kv, dtype, 2),
        product(tokens, q, h, dtype),
        product(tokens, h, f, dtype, 2),
        product(tokens, f, h, dtype),
        Operation("elementwise", 0.0, 2.0 * e * tokens * h, 2),  # two norms
        Operation("elementwise", 0.0, 2.0 * e * tokens * (q + kv)),  # rotary embedding
        Operation("elementwise", 0.0, 3.0 * e * tokens * f),  # silu(gate) * up
        Operation("elementwise", 0.0, 3.0 * e * tokens * h, 2),  # two residual sums
    ]


def head_operations(config: ModelConfig, tokens: int, dtype: str) -> list[Operation]:
    """The forward pass of embedding, last norm, LM head and loss."""
    h, e = config.hidden_size, ITEM_BYTES[dtype]
    return [
        Operation("elementwise", 0.0, 2.0 * e * tokens * h, 2),
        product(tokens, h, config.vocab_size, dtype),
        Operation("elementwise", 0.0, 2.0 * e * tokens * config.vocab_size),
    ]


OPERATIONS = (layer_operations, head_operations)


def seconds(device: Device, operations: list[Operation], dtype: str, *, backward: bool) -> float:
    """Time (s) of some operations, forward, or backward (each twice)."""
    once = sum(op.times * device.seconds(op.operator, op.flops, op.nbytes, dtype) for op in operations)
    return 2 * once if backward else once


def layer_seconds(
    device: Device, config: ModelConfig, tokens: int, dtype: str, kind: LayerKind
) -> tuple[float, float]:
    """(forward, backward) seconds of a layer of a kind, without attention."""
    if kind.type != "linear_attention":
        work = layer_operations(config, tokens, dtype)
        return seconds(device, work, dtype, backward=False), seconds(device, work, dtype, backward=True)
    parts = layer_parts(Block(config, 1, tokens, dtype, "fused"), _linear_layer(config)).values()
    forward, backward = (
        sum(
            device.seconds(o.operator, o.work.flops, o.work.nbytes, o.dtype)
            for p in parts
            for o in operators(p)
        )  # type: ignore[arg-type]
        for operators in (lambda p: p.forward, lambda p: p.backward)
    )
    return forward, backward


def activation_bytes(config: ModelConfig, dtype: str, *, recompute: bool) -> float:
    """Bytes of one token kept in one layer for its backward pass, mean over layers.

    Kept whole: two layer inputs and two norm outputs (h each), q, k, v, the attention output and its logsumexp,
    gate, up and their product; of linear layers all they save. Recomputed: the layer's input alone.
    """
    h, f, e = config.hidden_size, config.intermediate_size, ITEM_BYTES[dtype]
    if recompute:
        return e * h
    total = 0.0
    for kind, count in layer_kinds(config).items():
        if kind.type == "linear_attention":
            block = Block(config, 1, MANY, dtype, "fused", linear=True)
            total += count * sum(s.nbytes for s in saved_tensors(block)) / MANY
            continue
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        total += count * (e * (4 * h + 2 * q + 2 * kv + 3 * f) + 4 * config.num_attention_heads)
    return total / config.num_hidden_layers


def head_bytes(config: ModelConfig, dtype: str) -> float:
    """Bytes of one token in LM head and loss: logits in the model's dtype, once and as a gradient."""
    return 2.0 * ITEM_BYTES[dtype] * config.vocab_size


def layer_parameters(config: ModelConfig) -> float:
    """Trained parameters of one layer, mean."""
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return (config.parameters() - embeddings) / config.num_hidden_layers


def _linear_layer(config: ModelConfig) -> int:
    return next(layer for layer in config.layers if config.is_linear(layer))
