"""The parameters of a layer by the names that the decoder gives them, without "weight"."""

from __future__ import annotations

from counterpoint.kernels.kernel import TensorSpec
from counterpoint.model.config import ModelConfig
from counterpoint.model.linear_config import DECAY_RANK

ADAPTED = ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def layer_weights(config: ModelConfig, dtype: str, layer: int) -> dict[str, TensorSpec]:
    """The parameters of a layer: of its attention, softmax or linear, its feed-forward and its norms."""
    c = config
    shapes: dict[str, tuple[int, ...]] = linear_weights(c) if c.is_linear(layer) else softmax_weights(c)
    inner = {
        "gate_proj": (c.intermediate_size, c.hidden_size), "up_proj": (c.intermediate_size, c.hidden_size),
        "down_proj": (c.hidden_size, c.intermediate_size),
    }  # fmt: skip
    for name, shape in inner.items():
        shapes[name] = shape
        if c.mlp_bias:
            shapes[f"{name}.bias"] = shape[:1]
    shapes["input_layernorm"] = shapes["post_attention_layernorm"] = (c.hidden_size,)
    return {name: TensorSpec(shape, dtype) for name, shape in shapes.items()}


def softmax_weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of softmax attention."""
    c, d = config, config.head_dim
    width, narrow = c.num_attention_heads * d, c.num_key_value_heads * d
    shapes: dict[str, tuple[int, ...]] = {}
    for name, outer in (("q_proj", width), ("k_proj", narrow), ("v_proj", narrow)):
        shapes[name] = (outer, c.hidden_size)
        if c.attention_bias:
            shapes[f"{name}.bias"] = (outer,)
    shapes["o_proj"] = (c.hidden_size, width)
    if c.output_bias:
        shapes["o_proj.bias"] = (c.hidden_size,)
    if c.qk_norm:
        shapes["q_norm"] = shapes["k_norm"] = (d,)
    return shapes


def linear_weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of linear attention."""
    s, hidden = config.linear, config.hidden_size
    assert s is not None
    keys, values = s.num_heads * s.key_head_dim, s.num_heads * s.value_head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "q_proj": (keys, hidden), "k_proj": (keys, hidden), "v_proj": (values, hidden), "o_proj": (hidden, values),
        "o_norm": (s.value_head_dim,),
    }  # fmt: skip
    if s.output_gate:
        shapes["g_proj"] = (values, hidden)
    if s.conv_kernel_dim:
        shapes["conv_weight"] = (s.channels, s.conv_kernel_dim)
    if s.decay == "scalar":
        shapes |= {"decay_proj": (s.num_heads, hidden), "decay_proj.bias": (s.num_heads,)}
    if s.decay == "vector":
        shapes |= {
            "decay_down": (DECAY_RANK, hidden),
            "decay_proj": (keys, DECAY_RANK),
            "decay_proj.bias": (keys,),
        }
    return shapes


def adapter_weights(config: ModelConfig, rank: int, layer: int) -> dict[str, TensorSpec]:
    """LoRA adapters of the projections of a layer, in float32: a (rank, in) and b (out, rank)."""
    adapters = {}
    for name, spec in layer_weights(config, "float32", layer).items():
        if name in ADAPTED:
            adapters[f"{name}.a"] = TensorSpec((rank, spec.shape[1]))
            adapters[f"{name}.b"] = TensorSpec((spec.shape[0], rank))
    return adapters
