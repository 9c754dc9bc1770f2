"""Models with linear attention layers: their config, their decoder, and sampling from states instead of keys."""

from __future__ import annotations

import json

import pytest
import torch

from counterpoint.model.cache import KeyValueCache
from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Decoder
from counterpoint.model.linear_config import LINEAR_DECAYS
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.training.config import ParallelConfig
from counterpoint.training.mixing import layer_layouts, mixing

FIELDS = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}


def hybrid(**changes) -> ModelConfig:
    return ModelConfig.from_dict(FIELDS | {f"linear_{key}": value for key, value in changes.items()})


VARIANTS = [
    *({"decay": decay, "conv_kernel_dim": width} for decay in LINEAR_DECAYS for width in (0, 4)),
    {"decay": "retention", "decay_rates": [1.0, 0.5, 0.9, 0.99], "num_heads": 4},
    {"num_heads": 3, "key_head_dim": 5, "value_head_dim": 6, "output_gate": False, "feature_map": "elu"},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_the_config_reads_back_and_counts_the_parameters_that_exist(changes: dict) -> None:
    config = hybrid(**changes)
    assert config.model_type == "counterpoint_hybrid"
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert [config.is_linear(i) for i in config.layers] == [True, False, True]
    model = Decoder(config)
    assert sum(p.numel() for p in model.parameters()) == config.parameters()
    assert config.flops_per_token(2048) < ModelConfig.from_dict(FIELDS | {"layer_types": []}).flops_per_token(
        2048
    )


@pytest.mark.parametrize("changes", VARIANTS)
def test_token_by_token_equals_all_at_once(changes: dict) -> None:
    config = hybrid(**changes)
    model = Decoder(config, seed=1)
    for name, parameter in model.named_parameters():
        if "decay_proj" in name:  # decays that differ from token to token
            torch.nn.init.normal_(parameter, std=2.0)
    tokens, positions = torch.randint(64, (1, 21)), torch.arange(21)
    whole = mixing(config, ParallelConfig(), SequenceLayout("zigzag", 21, 1), None, None)  # type: ignore[call-arg]
    with torch.no_grad():
        expected = model(tokens, positions, whole.attends)
        cache = KeyValueCache(config, 21)
        parts = [
            model(tokens[:, a:b], positions[a:b], cache.attends)
            for a, b in ((0, 2), (2, 13), *((i, i + 1) for i in range(13, 21)))
        ]
    assert not whole.moves
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-5)


def test_documents_reset_states_and_convolutions() -> None:
    config = hybrid(decay="vector", conv_kernel_dim=3)
    model, tokens = Decoder(config), torch.randint(64, (1, 12))
    layout = SequenceLayout("contiguous", 12, 1, (5, 7))
    packed = mixing(config, ParallelConfig(), layout, None, None)  # type: ignore[call-arg]
    alone = mixing(config, ParallelConfig(), SequenceLayout("contiguous", 7, 1), None, None)  # type: ignore[call-arg]
    with torch.no_grad():
        both = model(tokens, layout.position_ids(0), packed.attends)
        second = model(tokens[:, 5:], torch.arange(7), alone.attends)
    assert torch.allclose(both[:, 5:], second, atol=1e-6)


def test_linear_layers_keep_tokens_in_order_and_softmax_layers_as_configured() -> None:
    layout = SequenceLayout("zigzag", 40, 2, (10, 30))
    kinds = [x.kind for x in layer_layouts(hybrid(), layout)]
    assert kinds == ["contiguous", "zigzag", "contiguous"]
    assert all(x.documents == (10, 30) for x in layer_layouts(hybrid(), layout))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"linear_decay": "exponential"},
            "linear_decay 'exponential' is not supported; use one of none, retention",
        ),
        (
            {"linear_decay": "retention", "linear_decay_rates": [1.0, 0.5, 1.2, 0.1]},
            "linear_decay_rates has 1.2; a d",
        ),
        ({"linear_decay": "retention", "linear_decay_rates": [0.5]}, "gives 1 decays for 4 heads"),
        ({"linear_decay_rates": [0.5] * 4}, "go with linear_decay retention, not scalar"),
        ({"linear_decay": "retention", "linear_decay_rates": ["x"]}, "must be a list of numbers"),
        ({"linear_num_heads": 0}, "linear_num_heads 0 must be positive"),
        ({"linear_conv_kernel_dim": -1}, "linear_conv_kernel_dim -1 must be 0"),
        ({"linear_key_head_dim": 2.5}, "linear_key_head_dim 2.5 must be a whole number"),
        ({"linear_output_gate": "yes"}, "linear_output_gate 'yes' must be true or false"),
        ({"layer_types": ["linear_attention"]}, "layer_types names 1 layers, num_hidden_layers is 3"),
        ({"layer_types": ["linear_attention", "full", "full"]}, r"layer_types \['full'\] not supported"),
        ({"layer_types": [], "linear_decay": "none"}, "linear_decay is given, but no layer is linear"),
        ({"model_type": "qwen3"}, "go with model_type counterpoint_hybrid or llama, not qwen3"),
        ({"model_type": "counterpoint_hybrid", "layer_types": []}, "needs layers of type linear_attention"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(FIELDS | changes)
