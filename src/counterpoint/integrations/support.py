"""Which transformers models can run sharded over the sequence, and clear words for those that cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

MODEL_TYPES = (
    "granite", "llama", "mistral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2",
)  # fmt: skip
"""Decoders whose tokens meet only in attention, with plain softmax; all tested against one process."""

_ROPE = ("default", "linear", "llama3", "yarn")
_LAYERS = ("full_attention", "sliding_attention")


def check_model(model: Any) -> None:
    """Raise ValueError unless the model can run sharded over the sequence."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"sequence_parallel takes a transformers model, got {type(model).__name__}; "
            "call it on the model itself, before DDP, PEFT or other wrappers"
        )
    config: Any = model.config
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"models of type {config.model_type!r} are not supported; these are: {', '.join(MODEL_TYPES)}. "
            "For a model of your own call counterpoint.attention in its attention layer"
        )
    if not type(model).__name__.endswith(("ForCausalLM", "Model")):
        raise ValueError(
            f"{type(model).__name__} has a head that reads whole sequences; use ForCausalLM or base model"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError("attention with soft-capped logits is not supported; remove attn_logit_softcapping")
    layers = set(getattr(config, "layer_types", None) or _LAYERS) - set(_LAYERS)
    if layers:
        raise ValueError(
            f"layers of type {', '.join(sorted(layers))} are not supported; {' and '.join(_LAYERS)} are"
        )
    for rope in _rope_types(config):
        if rope not in _ROPE:
            raise ValueError(
                f"rotary embeddings of type {rope!r} depend on the length that a process sees, so shards "
                f"would disagree; use one of {', '.join(_ROPE)}"
            )


def check_mask(mask: Any) -> None:
    """Raise ValueError unless an attention mask says nothing: None, or (batch, tokens) of ones."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ValueError(
            "a ready-made attention mask is not supported on a sharded sequence; leave it out and give "
            "packed documents to parallel.shard (documents=lengths)"
        )
    if not bool(mask.all()):
        raise ValueError(
            "padding is not supported on a sharded sequence: pack the documents into one row instead "
            "(parallel.shard(..., documents=lengths)), or pad on the right, set the labels there to -100 and "
            "leave attention_mask out: in a causal model no token sees what follows it"
        )


def _rope_types(config: Any) -> Iterator[str]:
    """Kinds of rotary embedding: in rope_parameters, by layer type or not; or rope_scaling (transformers 4)."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for one in given.values() if any(isinstance(v, dict) for v in given.values()) else [given]:
        if isinstance(one, dict):
            yield one.get("rope_type", one.get("type", "default"))
