"""The model that a configuration names, and whether its attention can be shared as the configuration says.

Nothing here imports torch: mistakes are found before any process starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from counterpoint.model.config import HYBRID, ModelConfig
from counterpoint.model.linear_config import LINEAR_KEYS
from counterpoint.model.presets import PRESETS
from counterpoint.strategies.sequence.attention import AttentionProblem, backward_schedule, parse_choices
from counterpoint.strategies.sequence.blocks import AttentionShape
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.strategies.sequence.linear import LinearProblem, parse_linear
from counterpoint.strategies.sequence.linear_builder import LinearShape
from counterpoint.training.config import TrainConfig
from counterpoint.training.config_errors import nearest

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", HYBRID)


def model_config(model: str | Mapping[str, Any], vocabulary: int | None = None) -> ModelConfig:
    """The shape of the model.

    Args:
        model: the name of a preset; a config.json or a directory with one; or its fields, on top of the
            preset that `preset` names if that is given, else of type llama.
        vocabulary: size of the tokenizer's vocabulary. It sets `vocab_size` where the model leaves it open
            (presets, fields without it).

    Raises:
        ValueError: an unknown preset, file or field, impossible values, fewer embeddings than tokens.
    """
    if isinstance(model, str):
        if model in PRESETS:
            return model_config({"preset": model}, vocabulary)
        if "/" not in model and not model.endswith(".json"):
            known = ", ".join(PRESETS)
            raise ValueError(
                f"model = {model}: not a preset ({known}) nor a path; write ./{model} for a path"
            )
        config = ModelConfig.read(model)
    else:
        config = ModelConfig.from_dict(_fields(model, vocabulary))
    if vocabulary is not None and config.vocab_size < vocabulary:
        raise ValueError(
            f"the model has {config.vocab_size} embeddings and the tokenizer {vocabulary} tokens; "
            "raise vocab_size or use a smaller vocabulary"
        )
    return config


def check_attention(config: TrainConfig, shape: ModelConfig) -> None:
    """ValueError when a sequence does not fit the model, or its processes cannot share its attention."""
    length, parallel = config.data.sequence_length, config.parallel
    if length > shape.max_position_embeddings:
        raise ValueError(
            f"data.sequence_length = {length} exceeds the model's max_position_embeddings = "
            f"{shape.max_position_embeddings}; shorten it or raise the model's"
        )
    if config.batching.ragged:
        size = parallel.sequence_size * (1 if parallel.data == "auto" else parallel.data)
        layout, mesh = SequenceLayout("document-zigzag", max(length, size), size), (size,)
    else:
        size, mesh = parallel.sequence_size, parallel.sequence
        layout = SequenceLayout(parallel.layout, max(length, size), size)
    if length < size and not config.batching.ragged:
        raise ValueError(
            f"data.sequence_length = {length} leaves some of {size} processes without tokens; raise it"
        )
    if size == 1:
        return
    if any(shape.is_linear(layer) for layer in shape.layers):
        _check_linear(config, shape, size)
    if all(shape.is_linear(layer) for layer in shape.layers):
        return
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    forward, backward = map(parse_choices, parallel.strategies)
    problem = AttentionProblem(
        AttentionShape(1, heads, kv_heads, shape.head_dim, "float32", None),
        layout,
        mesh,
        forward,
        backward,
    )
    try:
        backward_schedule(problem, 0)
    except ValueError as error:
        raise ValueError(f"parallel.forward, parallel.backward: {error}") from None


def check_memory(config: TrainConfig, shape: ModelConfig, device: str | None = None) -> None:
    """ValueError when the memory policy does not fit the model's layers, or the kind of device ("cpu", "cuda")."""
    policy = config.memory.policy
    layers = [policy.layer(i, shape.num_hidden_layers) for i in shape.layers]
    if device == "cpu" and any(layer.kind == "offload" for layer in layers):
        raise ValueError(
            "memory.layers = offload needs a GPU: on a CPU host memory is the device's own, there is nowhere to "
            "move activations to; use recompute or stream"
        )
    streamed = [i for i in shape.layers if shape.is_linear(i) and layers[i].kind == "stream"]
    if streamed:
        raise ValueError(
            f"memory.layers = stream works on softmax layers, but layer {streamed[0]} attends linearly; "
            "use recompute there"
        )


def _check_linear(config: TrainConfig, shape: ModelConfig, size: int) -> None:
    parallel, linear = config.parallel, shape.linear
    assert linear is not None
    strategy = parse_linear(parallel.linear)
    try:
        LinearProblem(
            LinearShape(1, linear.num_heads, linear.key_head_dim, linear.value_head_dim),
            SequenceLayout("contiguous", max(config.data.sequence_length, size), size),
            strategy,
            strategy,
        ).schedule("backward", 0)
    except ValueError as error:
        raise ValueError(f"parallel.linear: {error}") from None


def _fields(model: Mapping[str, Any], vocabulary: int | None) -> dict[str, Any]:
    fields = dict(model)
    preset = fields.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"model.preset = {preset}: allowed are {', '.join(PRESETS)}")
    base: dict[str, Any] = dict(PRESETS[preset]) if preset is not None else {"model_type": "llama"}
    family = fields.get("model_type", base["model_type"])
    known = dict.fromkeys(_known(family), "")
    for name in fields:
        if name not in known:
            raise ValueError(
                f"unknown key model.{name}; the nearest known one is model.{nearest(name, known)}"
            )
    if vocabulary is not None:
        base["vocab_size"] = vocabulary
    elif "vocab_size" not in {**base, **fields}:
        base["vocab_size"] = 256  # not known yet: a stand-in that lets the other fields be checked
    return {**base, **fields}


def _known(family: str) -> list[str]:
    if family not in _FAMILIES:
        raise ValueError(f"model.model_type = {family}: allowed are {', '.join(_FAMILIES)}")
    linear = LINEAR_KEYS if family in ("llama", HYBRID) else ()
    like = "llama" if family == HYBRID else family
    shape = ModelConfig.from_dict({**PRESETS["tiny"], "model_type": like})
    return [
        *shape.to_dict(),
        "rope_parameters",
        "layer_types",
        *linear,
        *(["sliding_window"] if family == HYBRID else []),
    ]
