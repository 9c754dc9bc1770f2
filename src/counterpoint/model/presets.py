"""Small named shapes, in the words of a Hugging Face config.json; the tokenizer sets the vocabulary."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # for tests: 2 layers, a query group of 2
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    # about 1 million parameters. As many key/value heads as query heads: the case TokenRing is made for
    "demo": {
        "model_type": "llama",
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    # the same with linear attention in three layers of four
    "demo-hybrid": {
        "model_type": "counterpoint_hybrid",
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        "linear_decay": "scalar",
        "linear_conv_kernel_dim": 4,
    },
    # about 12 million
    "small": {
        "model_type": "llama",
        "vocab_size": 8192,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 32768,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    # the shape of HuggingFaceTB/SmolLM2-135M
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
}
