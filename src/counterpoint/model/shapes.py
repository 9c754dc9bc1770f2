"""Shapes of published models, to plan with: facts of their config.json files, no weights.

Unlike the presets (small shapes to train from scratch, whose vocabulary the tokenizer sets) these are fixed.
"""

from __future__ import annotations

from typing import Any

from counterpoint.model.config import ModelConfig
from counterpoint.model.presets import PRESETS


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
    }


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        **more,
    }


def _stretched(factor: float) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {"max_position_embeddings": 131072, "rope_scaling": scaling}


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, False),
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, vocab_size=32000, rope_theta=1e4, max_position_embeddings=4096),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8),
    "llama-3-70b": _llama(8192, 28672, 80, 64, 8),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, **_stretched(8.0)),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8, **_stretched(8.0)),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True, **_stretched(32.0)),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, head_dim=128, tie_word_embeddings=True, **_stretched(32.0)),
}  # fmt: skip


def find_shape(name: str) -> ModelConfig:
    """The shape of a published model, of a preset, or of a config.json (or a directory with one).

    Raises ValueError for a name that is none of these, naming those there are.
    """
    known = {**PRESETS, **SHAPES}
    if name.lower() in known:
        return ModelConfig.from_dict(known[name.lower()])
    if "/" not in name and not name.endswith(".json"):
        raise ValueError(
            f"model {name!r} is neither a known shape ({', '.join(known)}) nor a path; write ./{name} for a path"
        )
    return ModelConfig.read(name)
