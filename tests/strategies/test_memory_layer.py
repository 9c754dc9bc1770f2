"""A layer's schedule computes what autograd computes, and holds what the formulas say, under every policy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Layer, rotary_angles
from counterpoint.runtime.attention import attention
from counterpoint.runtime.executor import Executor
from counterpoint.strategies.memory.cost import Block
from counterpoint.strategies.memory.layer import Recipe
from counterpoint.strategies.memory.layers import layer_schedule
from counterpoint.strategies.memory.policy import LayerPolicy
from support.hybrids import OneProcess, hybrid, hybrids


def config(family: str = "qwen3", window: int | None = None) -> ModelConfig:
    shape = ModelConfig.from_dict(
        {
            "model_type": family, "vocab_size": 64, "hidden_size": 24, "intermediate_size": 40,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        }
    )  # fmt: skip
    return replace(shape, sliding_window=window)


policies = st.one_of(
    st.just(LayerPolicy("keep")),
    st.just(LayerPolicy("recompute")),
    st.builds(lambda n: LayerPolicy("stream", n), st.integers(1, 5)),
    st.builds(lambda r: LayerPolicy("offload", ratio=r), st.sampled_from([0.0, 0.4, 1.0])),
)


def tensors(recipe: Recipe, seed: int = 0) -> tuple[dict[str, torch.Tensor], Layer]:
    """Inputs of the schedule by name, and the layer they belong to."""
    block = recipe.block
    torch.manual_seed(seed)
    dtype = getattr(torch, block.dtype)
    layer = Layer(block.config, 0).to(dtype)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(block.batch, block.tokens, block.config.hidden_size, dtype=dtype)
    cos, sin = (t.to(dtype) for t in rotary_angles(block.config, torch.arange(block.tokens)))
    given = {"x": x, "dy": torch.randn_like(x), "cos": cos.transpose(1, 2), "sin": sin.transpose(1, 2)}
    for name, p in layer.named_parameters():
        given[short(name)] = p.detach()
    return given, layer


def short(name: str) -> str:
    return (
        name.split(".", 1)[1].removesuffix(".weight")
        if "norm" not in name.split(".")[0]
        else name.split(".")[0]
    )


def by_autograd(recipe: Recipe, given: dict[str, torch.Tensor], layer: Layer) -> dict[str, torch.Tensor]:
    window = recipe.block.config.sliding_window
    mix = OneProcess() if recipe.block.linear else lambda q, k, v: attention(q, k, v, window=window)
    x = given["x"].clone().requires_grad_()
    cos, sin = (given[name].transpose(1, 2) for name in ("cos", "sin"))
    y = layer(x, cos, sin, mix)
    y.backward(given["dy"])
    assert x.grad is not None
    grads = {short(name): p.grad for name, p in layer.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **grads}  # type: ignore[dict-item]


@settings(max_examples=30, deadline=None)
@given(
    policies, st.integers(1, 21), st.integers(1, 2), st.sampled_from([1, 3]),
    st.sampled_from(["llama", "qwen2", "qwen3"]), st.sampled_from(["fused", "composed"]), st.sampled_from([None, 6]),
)  # fmt: skip
def test_gradients_equal_those_of_autograd(policy, tokens, batch, tiles, family, norm, window) -> None:
    block = Block(config(family, window), batch, tokens, "float64", norm)
    recipe = Recipe(block, policy, tiles)
    given, layer = tensors(recipe)
    expected = by_autograd(recipe, given, layer)
    made = Executor(None).run(layer_schedule(recipe), given)
    assert set(made) == set(expected)
    for name, value in made.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9, msg=name)


@settings(max_examples=30, deadline=None)
@given(
    hybrids(), policies.filter(lambda p: p.kind != "stream"), st.integers(1, 21), st.integers(1, 2),
    st.sampled_from([1, 3]), st.sampled_from(["fused", "composed"]),
)  # fmt: skip
def test_gradients_of_linear_layers_equal_those_of_autograd(
    shape, policy, tokens, batch, tiles, norm
) -> None:
    recipe = Recipe(Block(shape, batch, tokens, "float64", norm, linear=True), policy, tiles)
    given, layer = tensors(recipe)
    expected = by_autograd(recipe, given, layer)
    made = Executor(None).run(layer_schedule(recipe), given)
    assert set(made) == set(expected)
    for name, value in made.items():  # log decays go through float32
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_linear_layers_cannot_be_streamed() -> None:
    with pytest.raises(
        ValueError, match=r"stream\(4\) works on softmax layers; keep, recompute or offload linear"
    ):
        Recipe(Block(hybrid(), 1, 8, linear=True), LayerPolicy("stream", 4))
