"""Every memory policy gives plain autograd's gradients, and each parameter gets its own in one piece."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint import SequenceLayout, attention
from counterpoint.kernels.mask import AttentionMask
from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Decoder
from counterpoint.model.loss import token_loss
from counterpoint.runtime.memory.layers import layer_runs
from counterpoint.strategies.memory.policy import MemoryPolicy, parse_layers

LLAMA = {"num_hidden_layers": 2}
SHAPES = {
    "grouped-tied": LLAMA,
    "multi-head-untied": {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "biases": {**LLAMA, "attention_bias": True, "output_bias": True, "mlp_bias": True},
    "norms-of-heads": {**LLAMA, "model_type": "qwen3", "qk_norm": True, "num_key_value_heads": 1},
    "window": {**LLAMA, "model_type": "mistral", "sliding_window": 9},
    "some-windows": {
        "num_hidden_layers": 2,
        "model_type": "qwen2",
        "sliding_window": 5,
        "layer_types": ("full_attention", "sliding_attention"),
    },
}


def model_of(shape: str, dtype=torch.float32) -> Decoder:
    config = ModelConfig.preset("tiny", vocab_size=64, initializer_range=0.1, **SHAPES[shape])
    model = Decoder(config)
    with torch.no_grad():  # biases and norms away from the zeros and ones they start at
        g = torch.Generator().manual_seed(1)
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=g))
    return model.to(dtype)


def batch_of(tokens: int, rows: int, padding: int, seed: int = 0):
    """Tokens and labels; the last row ends in `padding` tokens without a label."""
    g = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(64, (2, rows, tokens), generator=g)
    labels[:, ::7] = -100
    labels[-1, tokens - padding :] = -100
    return ids, labels


def gradients(model: Decoder, ids, labels, documents, policy: MemoryPolicy):
    layout = SequenceLayout("zigzag", ids.shape[1], 1, documents)
    config = model.config
    masks = [AttentionMask(window=config.window(i), documents=documents) for i in config.layers]
    model.zero_grad()
    loss = model(
        ids,
        layout.position_ids(0),
        [partial(attention, layout=layout, window=config.window(i)) for i in config.layers],
        run=layer_runs(policy, len(masks), masks),
        use=lambda hidden, head: token_loss(hidden, head.weight, labels, policy.head_tokens)[0],
    )
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def relative(found, expected) -> float:
    apart = sum(float((found[n] - g).square().sum()) for n, g in expected.items())
    return (apart / sum(float(g.square().sum()) for g in expected.values())) ** 0.5


def worst(found, expected) -> float:
    return max(float((found[n] - g).norm() / g.norm().clamp_min(1e-30)) for n, g in expected.items())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunks", range(1, 9))
def test_streamed_gradients_are_those_of_plain_autograd(shape, chunks):
    """Padding, packed documents, chunk borders inside documents.

    In float32 all gradients together; a single small one (a bias of keys) is itself known to 1e-6 only. In float64
    each of them.
    """
    ids, labels = batch_of(61, 2, padding=13)
    documents = (7, 30, 24)
    policy = MemoryPolicy(parse_layers(f"stream({chunks})"), head_tokens=10)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        model = model_of(shape, dtype)
        loss, expected = gradients(model, ids, labels, documents, MemoryPolicy(head_tokens=None))
        found_loss, found = gradients(model, ids, labels, documents, policy)
        assert float((found_loss - loss).abs() / loss) <= tolerance
        assert relative(found, expected) <= tolerance
    assert worst(found, expected) <= 1e-11


entries = st.one_of(
    st.sampled_from(["keep", "recompute"]), st.builds("stream({})".format, st.integers(1, 12))
)


@given(
    shape=st.sampled_from(list(SHAPES)),
    layers=st.tuples(entries, entries),
    tiles=st.integers(1, 5),
    head_tokens=st.one_of(st.none(), st.integers(1, 40)),
    tokens=st.integers(1, 40),
    rows=st.integers(1, 2),
    cut=st.floats(0, 1),
)
@settings(max_examples=40)
def test_any_mixture_of_policies_is_exact(shape, layers, tiles, head_tokens, tokens, rows, cut):
    model = model_of(shape, torch.float64)
    ids, labels = batch_of(tokens, rows, padding=tokens // 3, seed=tokens)
    labels[:, 0] = 1  # at least one token counts
    first = int(cut * tokens)
    documents = (first, tokens - first) if 0 < first < tokens else ()
    loss, expected = gradients(model, ids, labels, documents, MemoryPolicy(head_tokens=None))
    policy = MemoryPolicy(parse_layers(layers), tiles, head_tokens)
    found_loss, found = gradients(model, ids, labels, documents, policy)
    assert float((found_loss - loss).abs() / loss) <= 1e-12
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("layers, tiles", [("stream(5)", 1), ("keep", 4), ("recompute", 3), ("stream(3)", 2)])
def test_a_parameter_gets_one_gradient(layers, tiles):
    """Hooks that reduce gradients run once per parameter, however many chunks there are."""
    model, (ids, labels) = model_of("grouped-tied"), batch_of(40, 1, 0)
    whole, added = dict.fromkeys(n for n, _ in model.named_parameters()), []
    calls = dict.fromkeys(whole, 0)

    for name, p in model.named_parameters():
        p.register_hook(lambda _, n=name: calls.update({n: calls[n] + 1}))
        p.register_post_accumulate_grad_hook(lambda _, n=name: added.append(n))
    gradients(model, ids, labels, (), MemoryPolicy(parse_layers(layers), tiles))
    assert set(calls.values()) == {1}
    assert sorted(added) == sorted(whole)


def test_frozen_parameters_get_none():
    model, (ids, labels) = model_of("grouped-tied"), batch_of(40, 1, 0)
    frozen = [p for n, p in model.named_parameters() if "down_proj" in n or "k_proj" in n]
    for p in frozen:
        p.requires_grad_(False)
    layout = SequenceLayout("zigzag", 40, 1)
    runs = layer_runs(MemoryPolicy(parse_layers("stream(3)")), 2, [AttentionMask()] * 2)
    model(ids, layout.position_ids(0), partial(attention, layout=layout), labels, run=runs)[0].backward()
    assert all(p.grad is None for p in frozen)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_nothing_is_kept_without_gradients():
    model, (ids, _) = model_of("window"), batch_of(40, 1, 0)
    attends = partial(attention, layout=SequenceLayout("zigzag", 40, 1), window=9)
    with torch.no_grad():
        expected = model(ids, torch.arange(40), attends)
        for layers in ("recompute", "stream(7)"):
            runs = layer_runs(MemoryPolicy(parse_layers(layers), 2), 2, [AttentionMask(window=9)] * 2)
            torch.testing.assert_close(model(ids, torch.arange(40), attends, run=runs), expected)


def test_autocast_holds_in_the_backward_pass():
    model, (ids, labels) = model_of("grouped-tied"), batch_of(24, 1, 0)
    with torch.autocast("cpu", torch.bfloat16):
        _, expected = gradients(model, ids, labels, (), MemoryPolicy())
        _, found = gradients(model, ids, labels, (), MemoryPolicy(parse_layers("stream(3)"), 2))
    assert 1e-6 < worst(found, expected) < 0.05


def test_the_policy_must_fit_the_layers():
    with pytest.raises(ValueError, match="names 3 layers, the model has 2; give one for each"):
        layer_runs(MemoryPolicy(parse_layers("keep*2, recompute")), 2)
