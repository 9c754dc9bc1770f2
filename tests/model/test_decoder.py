"""Our decoder with transformers' weights computes transformers' logits and gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from counterpoint.model.cache import KeyValueCache
from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Decoder

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "llama": {"model_type": "llama"},
    "llama-mha-tied": {"model_type": "llama", "num_key_value_heads": 6, "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-wide-heads": {"model_type": "llama", "head_dim": 16},
    "llama3-rope": {
        "model_type": "llama",
        "rope_parameters": {**LLAMA3, "rope_theta": 500.0, "original_max_position_embeddings": 64},
    },
    "mistral-window": {"model_type": "mistral", "sliding_window": 7},
    "qwen2-biases": {"model_type": "qwen2"},
    "qwen2-some-windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3-norms": {"model_type": "qwen3", "head_dim": 8, "num_key_value_heads": 1},
}


def windowed(window):
    """Plain masked attention: a query sees the `window` keys up to its own (all before it when None)."""

    def attend(q, k, v):
        length = q.shape[2]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        mask = (distance >= 0) & (distance < (window or length))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    return attend


def attends(config):
    return [windowed(config.window(layer)) for layer in config.layers]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(params=CASES, scope="module")
def pair(request):
    torch.manual_seed(0)
    hf_config = transformers.AutoConfig.for_model(
        **{**SHAPE, **CASES[request.param]}, attn_implementation="eager"
    )
    theirs = transformers.AutoModelForCausalLM.from_config(hf_config)
    with torch.no_grad():  # biases and norms away from the zeros and ones they start at
        for name, p in theirs.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(0.3 * torch.randn_like(p))
    ours = Decoder(ModelConfig.from_dict(hf_config.to_dict()))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_names_load_both_ways(pair):
    ours, theirs = pair
    theirs.load_state_dict(ours.state_dict())
    assert {n: p.shape for n, p in ours.named_parameters()} == {
        n: p.shape for n, p in theirs.named_parameters()
    }
    assert ours.config.parameters() == sum(p.numel() for p in theirs.parameters())


def test_logits_and_gradients_equal(pair):
    ours, theirs = pair
    tokens = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens).logits
    got = ours(tokens, torch.arange(40), attends(ours.config))
    assert relative(got, expected) <= 2e-5

    labels = F.pad(tokens[:, 1:], (0, 1), value=-100)
    total, count = ours(tokens, torch.arange(40), attends(ours.config), labels)
    loss = theirs(tokens, labels=tokens).loss
    assert int(count) == 78
    assert relative(total / count, loss) <= 2e-5
    ours.zero_grad(), theirs.zero_grad()
    (total / count).backward()
    loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert relative(p.grad, gradients[name].grad) <= 2e-5, name


def test_position_ids_per_row(pair):
    ours, _ = pair
    tokens = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(2))
    positions = torch.stack((torch.arange(12), torch.arange(12) + 100))
    got = ours(tokens, positions, attends(ours.config))
    rows = torch.cat([ours(tokens[i : i + 1], positions[i], attends(ours.config)) for i in range(2)])
    torch.testing.assert_close(got, rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [[23], [1] * 23, [9, 14], [17, 1, 1, 4]])
def test_cache_equals_the_whole_sequence(pair, steps):
    ours, _ = pair
    tokens = torch.randint(96, (1, 23), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        whole = ours(tokens, torch.arange(23), attends(ours.config))
        cache, parts, start = KeyValueCache(ours.config, 23), [], 0
        for n in steps:
            new = slice(start, start + n)
            parts.append(ours(tokens[:, new], torch.arange(23)[new], cache.attends))
            start += n
    assert relative(torch.cat(parts, dim=1), whole) <= 2e-5


def test_cache_blocks_a_long_windowed_prompt():
    config = ModelConfig.preset("tiny", model_type="mistral", sliding_window=100)
    model, tokens = Decoder(config), torch.arange(1200)[None] % 512
    with torch.inference_mode():
        whole = model(tokens, torch.arange(1200), attends(config))
        cached = model(tokens, torch.arange(1200), KeyValueCache(config, 1200).attends)
    assert relative(cached, whole) <= 2e-5


def test_initialisation_depends_on_the_seed_alone():
    config = ModelConfig.preset("tiny")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = Decoder(config, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = Decoder(config, seed=5), Decoder(config, seed=6)
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters()):
        assert torch.equal(a, b), name
        assert a.dim() == 1 or not torch.equal(a, c), name


def test_initialisation_scales_the_residual_projections():
    config = ModelConfig.preset(
        "tiny", hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=8
    )
    layer = Decoder(config).model.layers[3]
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
    assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)


def test_meta_device_costs_nothing_and_fills_later():
    config = ModelConfig.preset("tiny")
    with torch.device("meta"):
        model = Decoder(config, seed=3)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.initialise(3)
    for a, b in zip(model.parameters(), Decoder(config, seed=3).parameters()):
        assert torch.equal(a, b)


def test_wrong_number_of_attention_functions():
    config = dataclasses.replace(ModelConfig.preset("tiny"), num_hidden_layers=3)
    with pytest.raises(ValueError, match="2 attention functions for 3 layers"):
        Decoder(config)(torch.zeros(1, 4, dtype=torch.long), torch.arange(4), [windowed(None)] * 2)
