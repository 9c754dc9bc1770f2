"""Operator-level work adds up to what the model as a whole is said to cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Decoder
from counterpoint.model.work import LAYER_PARTS, model_parts
from counterpoint.strategies.memory.cost import layer_parameters


def config(**changes) -> ModelConfig:
    fields = {
        "model_type": "llama", "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, **changes,
    }  # fmt: skip
    return ModelConfig.from_dict(fields)


@given(
    st.integers(1, 5000), st.sampled_from([1, 2, 4]), st.booleans(), st.sampled_from(["llama", "qwen2", "qwen3"])
)  # fmt: skip
def test_matmul_flops_are_those_of_the_model(tokens: int, kv_heads: int, tied: bool, family: str) -> None:
    c = config(num_key_value_heads=kv_heads, tie_word_embeddings=tied, model_type=family)
    parts = model_parts(c, tokens)
    forward = sum(_matmul(parts[p].forward) for p in LAYER_PARTS) * 3 + _matmul(parts["head"].forward)
    again = _matmul(parts["head"].forward)  # the head's logits are computed twice
    backward = (
        sum(_matmul(parts[p].backward) for p in LAYER_PARTS) * 3 + _matmul(parts["head"].backward) - again
    )
    vectors = sum(p.numel() for p in Decoder(c).parameters() if p.dim() == 1)
    attention = 12.0 * c.num_attention_heads * c.head_dim * 3 * (tokens + 1) / 2
    wanted = tokens * (c.flops_per_token(tokens) - attention - 6 * vectors)
    assert forward + backward == pytest.approx(wanted, rel=1e-12)
    assert backward == 2 * forward


@given(st.booleans(), st.booleans(), st.sampled_from(["llama", "qwen2", "qwen3"]))
def test_parameters_of_parts_are_those_of_the_modules(tied: bool, bias: bool, family: str) -> None:
    c = config(
        tie_word_embeddings=tied, model_type=family, **({"mlp_bias": bias} if family == "llama" else {})
    )
    parts, model = model_parts(c, 10), Decoder(c)
    layer = model.model.layers[0]
    assert sum(parts[p].parameters for p in LAYER_PARTS) == layer_parameters(c)
    assert sum(p.numel() for p in layer.parameters()) == layer_parameters(c)
    whole = parts["embedding"].parameters + parts["head"].parameters + 3 * layer_parameters(c)
    assert whole == c.parameters() == sum(p.numel() for p in model.parameters())


def test_half_precision_halves_the_bytes_but_not_those_of_the_loss() -> None:
    full, half = (model_parts(config(), 100, dtype) for dtype in ("float32", "bfloat16"))
    for part in LAYER_PARTS:
        for a, b in zip(full[part].forward, half[part].forward, strict=True):
            assert (a.work.flops, a.work.nbytes) == (b.work.flops, 2 * b.work.nbytes)
    losses = [next(o for o in p["head"].forward if o.name == "cross_entropy") for p in (full, half)]
    assert losses[0].work == losses[1].work


def _matmul(operators) -> int:
    return sum(o.work.flops for o in operators if o.operator == "matmul")
