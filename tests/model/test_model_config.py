"""A config.json means the same to us as to transformers, and impossible shapes are refused in words."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.model.config import ModelConfig, RopeScaling
from counterpoint.model.presets import PRESETS

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def test_rope_is_read_from_both_generations_of_config_files():
    old = ModelConfig.from_dict({**LLAMA, "rope_theta": 5e5, "rope_scaling": LLAMA3})
    new = ModelConfig.from_dict({**LLAMA, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}})
    assert old == new
    assert old.rope_theta == 5e5
    assert old.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 32)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_silent_fields_mean_what_they_mean_in_transformers(family):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(**{**LLAMA, "model_type": family, "num_key_value_heads": 4})
    ours = ModelConfig.from_dict({**LLAMA, "model_type": family, "num_key_value_heads": 4})
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 48 // 4)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("layers", [None, ["sliding_attention", "full_attention"]])
def test_transformers_reads_what_we_write(family, layers, tmp_path):
    transformers = pytest.importorskip("transformers")
    extra = {"num_key_value_heads": 2, "max_position_embeddings": 256, "rope_parameters": {"rope_theta": 3e4}}
    if layers:
        extra |= {"use_sliding_window": True, "sliding_window": 16, "layer_types": layers}
    ours = ModelConfig.from_dict({**LLAMA, "model_type": family, **extra, "rope_scaling": LLAMA3})
    (tmp_path / "config.json").write_text(json.dumps(ours.to_dict()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__.lower() == family + "config"
    assert ModelConfig.from_dict(theirs.to_dict()) == ours == ModelConfig.read(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == 3e4
    if layers and family.startswith("qwen"):
        assert [ours.window(i) for i in ours.layers] == [16, None]


@given(
    family=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    groups=st.integers(1, 4),
    per_group=st.integers(1, 4),
    head_dim=st.integers(1, 40).map(lambda n: 2 * n),
    tied=st.booleans(),
    window=st.none() | st.integers(1, 99),
    bias=st.booleans(),
)
def test_round_trip(family, groups, per_group, head_dim, tied, window, bias):
    config = ModelConfig.from_dict(
        {
            **LLAMA,
            "model_type": family,
            "num_attention_heads": groups * per_group,
            "num_key_value_heads": groups,
            "head_dim": head_dim,
            "tie_word_embeddings": tied,
            "use_sliding_window": window is not None,
            "max_window_layers": 1,
            "sliding_window": window,
            "attention_bias": bias,
            "mlp_bias": bias,
        }
    )
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "supported are llama, mistral, qwen2, qwen3"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"hidden_size": None}, "hidden_size missing"),
        ({"hidden_size": "48"}, "hidden_size '48' must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0 must be positive"),
        ({"num_attention_heads": 0, "head_dim": 8}, "num_attention_heads 0 must be positive"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 must be positive"),
        ({"hidden_act": "gelu"}, "only silu"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "supported are default and llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "needs low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "only 1.0"),
    ],
)
def test_impossible_values_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig.from_dict({**LLAMA, **change})


@pytest.mark.parametrize(("content", "words"), [("{", "not valid JSON"), ("[]", "expected a JSON object")])
def test_broken_files_are_named(tmp_path, content, words):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json: .*{words}"):
        ModelConfig.read(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        ModelConfig.read(tmp_path / "absent")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_take_a_vocabulary(name):
    config = ModelConfig.preset(name, vocab_size=777)
    assert config.vocab_size == 777
    assert config.head_dim * config.num_attention_heads == config.hidden_size


def test_preset_errors():
    with pytest.raises(ValueError, match="presets are tiny, demo"):
        ModelConfig.preset("huge")
    with pytest.raises(ValueError, match="colour"):
        ModelConfig.preset("demo", colour=1)


def test_flops_count_every_causal_pair_once():
    config = ModelConfig.from_dict({**LLAMA, "num_key_value_heads": 2})
    length, pairs = 10, 55
    matmul = config.parameters() - config.vocab_size * config.hidden_size
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    assert config.flops_per_token(length) * length == pytest.approx(6 * matmul * length + attention)


@pytest.mark.parametrize("window", [1, 4, 10, 50])
def test_flops_with_a_window_count_the_visible_pairs(window):
    plain = dataclasses.replace(ModelConfig.from_dict(LLAMA), model_type="mistral")
    windowed = dataclasses.replace(plain, sliding_window=window)
    hidden_pairs = sum(1 for q in range(10) for k in range(q + 1) if q - k >= window)
    saved = 10 * (plain.flops_per_token(10) - windowed.flops_per_token(10))
    assert saved == pytest.approx(12 * 2 * 48 * hidden_pairs)


def test_does_not_import_torch():
    code = "import sys, counterpoint.model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
