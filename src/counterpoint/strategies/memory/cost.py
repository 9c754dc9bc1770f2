"""What a memory policy keeps, and what it costs: bytes from a list of the tensors that each operator saves.

E hidden size, H query heads, G key/value heads, D head dimension, F inner size; B sequences of S tokens. Counted is
what the decoder's operators (model/decoder.py) hand to autograd: every buffer once, however many operators save it.
Parameters, and the rotary angles that all layers share, are not part of a layer.

Sources: StreamBP (arXiv 2506.03077), ByteScale (arXiv 2502.21231).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from counterpoint.kernels.kernel import ITEM_BYTES, TensorSpec
from counterpoint.kernels.mask import AttentionMask
from counterpoint.kernels.tokens import Run, Tokens
from counterpoint.model.config import ModelConfig
from counterpoint.model.linear_config import DECAY_RANK
from counterpoint.strategies.memory.policy import LayerPolicy, MemoryPolicy

Norm = Literal["composed", "fused", "narrow"]
NORMS: tuple[str, ...] = get_args(Norm)
Part = Literal["input", "norm", "queries", "keys", "attention", "mlp_norm", "mlp"]


@dataclass(frozen=True, slots=True)
class Block:
    """Sequences that pass a layer together. linear: the layer attends linearly. norm: how RMSNorm is computed.

    composed: by single operators in float32, as on CPU (and in transformers), which keep the input in float32 and the
    normalised rows; fused: by one kernel, as on CUDA, which keeps its input and a number per row; narrow: as composed,
    but the normalised rows are kept in the activations' dtype, as transformers does.
    """

    config: ModelConfig
    batch: int
    tokens: int
    dtype: str = "bfloat16"
    norm: Norm = "composed"
    linear: bool = False

    def __post_init__(self) -> None:
        if self.batch < 1 or self.tokens < 1:
            raise ValueError(f"{self.batch} sequences of {self.tokens} tokens: give at least 1 of each")
        if self.dtype not in ("float64", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype {self.dtype!r} is no floating dtype; use float32, bfloat16 or float16")
        if self.norm not in NORMS:
            raise ValueError(f"norm {self.norm!r} is unknown; use {', '.join(NORMS)}")

    @property
    def item(self) -> int:
        """Bytes of an activation."""
        return ITEM_BYTES[self.dtype]

    @property
    def wide(self) -> str:
        """The dtype of norms and of statistics."""
        return "float64" if self.dtype == "float64" else "float32"

    def rows(self, tokens: int) -> Block:
        """The same layer over fewer tokens."""
        return replace(self, tokens=tokens)

    def at(self, layer: int) -> Block:
        """The same sequences in a layer of the model."""
        return replace(self, linear=self.config.is_linear(layer))


@dataclass(frozen=True, slots=True)
class Saved:
    """A buffer that lives from a layer's forward pass to its backward pass."""

    part: Part
    name: str
    spec: TensorSpec

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes


@dataclass(frozen=True, slots=True)
class Extra:
    """What a policy adds to a layer's forward and backward pass: flops, bytes of weights that are read once more (and
    of gradients that are read and written once more), bytes copied to host memory and back (each way)."""

    flops: int = 0
    weight_bytes: int = 0
    copied_bytes: int = 0


# ---- what operators save ---------------------------------------------------------------------------------------
def saved_tensors(block: Block) -> tuple[Saved, ...]:
    """Every buffer that a layer saves when all is kept, in the order in which the forward pass makes them.

    The input counts as saved where an operator saves it; composed norms of 2-byte activations save a float32 copy of
    it instead.
    """
    c, inner = block.config, block.config.intermediate_size
    saved = [
        *_norm(block, "norm", "x", c.hidden_size, first="input"),
        _tensor(block, "norm", "h", c.hidden_size),
    ]
    saved += _linear(block) if block.linear else _softmax(block)
    saved += [
        *_norm(block, "mlp_norm", "y", c.hidden_size),
        _tensor(block, "mlp_norm", "m", c.hidden_size),
        *(_tensor(block, "mlp", name, inner) for name in ("gate", "silu", "up", "product")),
    ]
    return tuple(saved)


def _softmax(block: Block) -> list[Saved]:
    c = block.config
    d, heads, kv_heads = c.head_dim, c.num_attention_heads, c.num_key_value_heads
    saved = []
    if c.qk_norm:
        saved += [*_norm(block, "queries", "q_raw", heads, d), *_norm(block, "keys", "k_raw", kv_heads, d)]
    return [
        *saved,
        _tensor(block, "queries", "q", heads, d),  # saved by attention, after both norms
        _tensor(block, "keys", "k", kv_heads, d),
        _tensor(block, "keys", "v", kv_heads, d),
        _tensor(block, "attention", "out", heads, d),
        _tensor(block, "attention", "lse", heads, dtype=block.wide),
    ]


def _linear(block: Block) -> list[Saved]:
    """Convolved q, k and v share one buffer. Log decays are float32 until attention takes them as its accumulator is;
    composed by single operators, as on CPU, their log-sigmoid saves a buffer too."""
    s = block.config.linear
    assert s is not None
    heads, keys, values, conv = s.num_heads, s.key_head_dim, s.value_head_dim, s.conv_kernel_dim
    featured = s.feature_map != "identity"
    saved = []
    if conv:
        padded = TensorSpec((block.batch, block.tokens + conv - 1, s.channels), block.dtype)
        saved += [Saved("attention", "padded", padded)]
        saved += [_tensor(block, "attention", name, s.channels) for name in ("convolved", "mixed")]
    elif featured:
        saved += [
            _tensor(block, "queries", "q_raw", heads * keys),
            _tensor(block, "keys", "k_raw", heads * keys),
        ]
    width = {"scalar": 1, "vector": keys}.get(s.decay, 0)
    if s.decay == "vector":
        saved.append(_tensor(block, "attention", "decay_down", DECAY_RANK))
    for name in ("decay", "decay.buffer")[: 1 + (block.norm == "composed")] if width else ():
        saved.append(_tensor(block, "attention", name, heads * width, dtype="float32"))
    saved.append(_tensor(block, "queries", "q", heads, keys))
    if featured or not conv:
        saved.append(_tensor(block, "keys", "k", heads, keys))
    if not conv:
        saved.append(_tensor(block, "keys", "v", heads, values))
    if width:
        saved.append(_tensor(block, "attention", "g", heads, width, dtype=block.wide))
    if s.decay == "retention":
        saved.append(Saved("attention", "rates", TensorSpec((heads,), block.wide)))
    saved += _norm(block, "attention", "o", heads, values)
    gated = ("out_gate", "normed", "out_silu", "gated") if s.output_gate else ("normed",)
    return saved + [_tensor(block, "attention", name, heads, values) for name in gated]


def _tensor(block: Block, part: Part, name: str, *dims: int, dtype: str = "") -> Saved:
    return Saved(part, name, TensorSpec((block.batch, block.tokens, *dims), dtype or block.dtype))


def _norm(block: Block, part: Part, name: str, *dims: int, first: Part | None = None) -> list[Saved]:
    """What a norm over the last of these dims saves."""
    scale = _tensor(block, part, f"{name}.scale", *dims[:-1], dtype=block.wide)
    if block.norm == "fused":
        return [_tensor(block, first or part, name, *dims), scale]
    own = _tensor(block, first or part, name, *dims)
    if block.dtype != block.wide:
        own = _tensor(block, part, f"{name}.wide", *dims, dtype=block.wide)
    unit = block.dtype if block.norm == "narrow" else block.wide
    return [own, scale, _tensor(block, part, f"{name}.unit", *dims, dtype=unit)]


def total(saved: Iterable[Saved], parts: Iterable[Part] | None = None) -> int:
    """Bytes of the buffers, of some parts only if given."""
    wanted = None if parts is None else set(parts)
    return sum(s.nbytes for s in saved if wanted is None or s.part in wanted)


def check_policy(block: Block, policy: LayerPolicy) -> None:
    """Raise ValueError for a policy that the layer cannot have."""
    if block.linear and policy.kind == "stream":
        raise ValueError(
            f"memory policy {policy} works on softmax layers; keep, recompute or offload linear attention layers"
        )


def input_bytes(block: Block) -> int:
    """Bytes of a layer's input, all that recompute and stream keep."""
    return block.batch * block.tokens * block.config.hidden_size * block.item


def kept_tensors(block: Block, mlp_tiles: int = 1) -> tuple[Saved, ...]:
    """What a layer that keeps all saves: with a tiled MLP only the MLP's input, not what is inside."""
    saved = saved_tensors(block)
    return saved if mlp_tiles == 1 else tuple(s for s in saved if s.part != "mlp")


def offloaded_tensors(block: Block, ratio: float, mlp_tiles: int = 1) -> tuple[Saved, ...]:
    """The saved buffers that go to host memory: the first ones that together stay within the ratio."""
    kept = kept_tensors(block, mlp_tiles)
    room, chosen = ratio * total(kept), []
    for s in kept:
        if s.nbytes <= room:
            chosen.append(s)
            room -= s.nbytes
    return tuple(chosen)


def saved_bytes(block: Block, policy: LayerPolicy, mlp_tiles: int = 1) -> int:
    """Bytes on the device between a layer's forward and its backward pass."""
    check_policy(block, policy)
    if policy.kind in ("recompute", "stream"):
        return input_bytes(block)
    whole = total(kept_tensors(block, mlp_tiles))
    if policy.kind == "keep":
        return whole
    return whole - total(offloaded_tensors(block, policy.share, mlp_tiles))


def host_bytes(block: Block, policy: LayerPolicy, mlp_tiles: int = 1) -> int:
    """Bytes in host memory between a layer's forward and its backward pass."""
    return total(offloaded_tensors(block, policy.share, mlp_tiles)) if policy.kind == "offload" else 0


def chunk_lengths(tokens: int, chunks: int) -> tuple[int, ...]:
    """Tokens of every chunk: equal ones, rounded up, the last one shorter; never an empty one."""
    size = -(-tokens // chunks)
    return tuple(min(size, tokens - start) for start in range(0, tokens, size))


def backward_saved_bytes(block: Block, policy: LayerPolicy, mlp_tiles: int = 1) -> int:
    """Most bytes of saved buffers alive at once while the layer's backward pass runs, its input included.

    keep and offload: all of them. recompute: the input beside what a new forward pass saves. stream: the input, keys
    and values of the whole sequence, and what one chunk saves on its way from the input to the output; what made
    keys and values is computed again at the end, chunk by chunk, when they are gone.
    """
    check_policy(block, policy)
    kept, tile = kept_tensors(block, mlp_tiles), mlp_tile_bytes(block, mlp_tiles)
    if policy.kind in ("keep", "offload"):
        return total(kept) + tile
    beside = 0 if any(s.name == "x" for s in kept) else input_bytes(block)
    if policy.kind == "recompute":
        return total(kept) + beside + tile
    longest = block.rows(max(chunk_lengths(block.tokens, policy.chunks)))
    chunk = total(kept_tensors(longest, mlp_tiles), ("norm", "queries", "attention", "mlp_norm", "mlp"))
    whole = input_bytes(block) + total(s for s in kept if s.name in ("k", "v"))
    return whole + chunk + mlp_tile_bytes(longest, mlp_tiles)


def mlp_tile_bytes(block: Block, mlp_tiles: int) -> int:
    """What one tile of a tiled MLP saves while its backward pass runs; 0 without tiles."""
    if mlp_tiles == 1:
        return 0
    longest = block.rows(max(chunk_lengths(block.tokens, mlp_tiles)))
    return total(saved_tensors(longest), ("mlp",))


# ---- head and loss ---------------------------------------------------------------------------------------------
def head_bytes(block: Block, head_tokens: int | None, backward: bool = True) -> int:
    """Bytes that the logits of `head_tokens` tokens (None: all) take at their peak, without the hidden states.

    Forward: logits in the activations' dtype, in float32, and their log-softmax. Backward, the logits freed: the
    log-softmax, the gradient of the loss, and the gradient of the float32 logits.
    """
    rows = block.batch * block.tokens
    rows = rows if head_tokens is None else min(rows, head_tokens)
    wide = ITEM_BYTES[block.wide]
    narrow = 0 if block.dtype == block.wide else block.item
    forward = narrow + 2 * wide
    return rows * block.config.vocab_size * max(forward, 3 * wide if backward else 0)


# ---- work ------------------------------------------------------------------------------------------------------
def visible_pairs(block: Block, layer: int = 0) -> int:
    """(query, key) pairs that see each other in one head of one sequence of a layer."""
    tokens = Tokens((Run(0, block.tokens),))
    mask = AttentionMask(causal=True, window=block.config.window(layer))
    return sum(area.pairs for area in mask.areas(tokens, tokens))


def layer_parameters(config: ModelConfig) -> int:
    """Parameters of one layer."""
    h = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2) + config.hidden_size
    return (config.parameters() - h) // config.num_hidden_layers


def forward_flops(block: Block, layer: int = 0) -> int:
    """Floating-point operations of a layer's matrix products and attention, forward."""
    c = block.config
    if block.linear:
        s = c.linear
        assert s is not None
        matrices = s.parameters(c.hidden_size) + 3 * c.hidden_size * c.intermediate_size
        states = 4 * s.num_heads * s.key_head_dim * s.value_head_dim
        return block.batch * block.tokens * (2 * matrices + states)
    width, narrow = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    matrices = 2 * c.hidden_size * (width + narrow) + 3 * c.hidden_size * c.intermediate_size
    return block.batch * (2 * block.tokens * matrices + 4 * visible_pairs(block, layer) * width)


def extra(block: Block, policy: LayerPolicy, mlp_tiles: int = 1, layer: int = 0) -> Extra:
    """What a layer's policy adds to computing it with everything kept.

    A stream of D chunks reads its weights 3 D times (forward, forward again, gradient of the input) where twice would
    do, those of keys and values 4 D times (they are computed once more at the end, to be differentiated), and adds to
    float32 sums of their gradients D times.
    """
    c = block.config
    inside = 6 * c.hidden_size * c.intermediate_size * block.batch * block.tokens
    tiled = inside if mlp_tiles > 1 else 0
    if policy.kind == "keep":
        return Extra(tiled, 0, 0)
    if policy.kind == "offload":
        return Extra(tiled, 0, host_bytes(block, policy, mlp_tiles))
    weights = layer_parameters(c) * block.item
    if policy.kind == "recompute":
        return Extra(forward_flops(block, layer) + tiled, weights, 0)
    chunks = len(chunk_lengths(block.tokens, policy.chunks))
    narrow = 2 * c.hidden_size * c.num_key_value_heads * c.head_dim
    read = (3 * chunks - 2) * weights + chunks * narrow * block.item
    sums = 2 * (chunks - 1) * layer_parameters(c) * ITEM_BYTES[block.wide]
    keys = 2 * block.batch * block.tokens * narrow
    return Extra(forward_flops(block, layer) + keys + tiled, read + sums, 0)


# ---- a whole model ---------------------------------------------------------------------------------------------
def model_saved_bytes(block: Block, policy: MemoryPolicy) -> int:
    """Bytes on the device between the forward and the backward pass of all layers of one rank."""
    layers = block.config.num_hidden_layers
    return sum(
        saved_bytes(block.at(i), policy.layer(i, layers), policy.mlp_tiles) for i in block.config.layers
    )


def rotary_bytes(block: Block) -> int:
    """Bytes of the cosines and sines that all layers share."""
    return 2 * block.tokens * block.config.head_dim * block.item
