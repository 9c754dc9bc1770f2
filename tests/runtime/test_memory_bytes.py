"""What autograd holds at its peak is what the formulas of strategies/memory say; what is offloaded comes back whole."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from counterpoint import SequenceLayout, attention
from counterpoint.kernels.mask import AttentionMask
from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Layer, rotary_angles
from counterpoint.model.linear import LinearAttention
from counterpoint.runtime.memory.layers import layer_runs
from counterpoint.runtime.memory.offload import Buffers, Offload
from counterpoint.strategies.memory.cost import Block, backward_saved_bytes, host_bytes, saved_bytes
from counterpoint.strategies.memory.policy import LayerPolicy, MemoryPolicy, parse_layers
from support.hybrids import OneProcess, hybrids


class Live:
    """Hooks that count the bytes of the storages that autograd holds, each once, and the most there ever were."""

    def __init__(self, apart: list[torch.Tensor]) -> None:
        self.apart = {t.untyped_storage().data_ptr() for t in apart}
        self.users: dict[int, int] = {}
        self.now = self.peak = 0

    def pack(self, t: torch.Tensor):
        storage = t.untyped_storage()
        at, nbytes = storage.data_ptr(), storage.nbytes()
        held = Held(t)
        if at not in self.apart:
            self.users[at] = self.users.get(at, 0) + 1
            if self.users[at] == 1:
                self.now += nbytes
                self.peak = max(self.peak, self.now)
            weakref.finalize(held, self.drop, at, nbytes)
        return held

    def drop(self, at: int, nbytes: int) -> None:
        self.users[at] -= 1
        if not self.users[at]:
            self.now -= nbytes

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)


class Held:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def layer_of(qk_norm: bool = False, groups: int = 2) -> Layer:
    family = "qwen3" if qk_norm else "llama"
    config = ModelConfig.preset(
        "tiny", vocab_size=32, model_type=family, qk_norm=qk_norm, num_key_value_heads=4 // groups
    )
    layer = Layer(config, 0)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    return layer


def softmax(tokens: int):
    return partial(attention, layout=SequenceLayout("contiguous", tokens, 1))


def measured(layer: Layer, tokens: int, batch: int, policy: LayerPolicy, tiles: int) -> tuple[int, int]:
    """Bytes held between the passes, and the most while the backward pass runs."""
    x = torch.randn(batch, tokens, layer.config.hidden_size, requires_grad=True)
    cos, sin = rotary_angles(layer.config, torch.arange(tokens))
    live = Live([cos, sin, *layer.parameters()])
    (run,) = layer_runs(MemoryPolicy((policy,), tiles), 1, [AttentionMask()])
    with live.hooks():
        linear = isinstance(layer.self_attn, LinearAttention)
        out = layer(x, cos, sin, OneProcess() if linear else softmax(tokens), run)
        between = live.now
        live.peak = 0
        out.backward(torch.ones_like(out))
    assert live.now == 0
    return between, max(live.peak, between)


policies = st.one_of(
    st.sampled_from([LayerPolicy("keep"), LayerPolicy("recompute")]),
    st.builds(lambda n: LayerPolicy("stream", n), st.integers(1, 9)),
)


@given(policies, st.integers(1, 64), st.integers(1, 2), st.booleans(), st.sampled_from([1, 2, 4]))
@settings(max_examples=30)
def test_held_bytes_are_the_formulas(policy, tokens, batch, qk_norm, groups):
    layer = layer_of(qk_norm, groups)
    block = Block(layer.config, batch, tokens, "float32")
    between, peak = measured(layer, tokens, batch, policy, 1)
    assert between == saved_bytes(block, policy)
    if policy.kind != "recompute":  # torch's checkpoint keeps what it makes again away from these hooks
        assert peak == backward_saved_bytes(block, policy)


@given(hybrids(), policies.filter(lambda p: p.kind != "stream"), st.integers(1, 64), st.sampled_from([1, 3]))
@settings(max_examples=30, deadline=None)
def test_held_bytes_of_linear_layers_are_the_formulas(shape, policy, tokens, tiles):
    block = Block(shape, 2, tokens, "float32", linear=True)
    between, peak = measured(Layer(shape, 0), tokens, 2, policy, tiles)
    assert between == saved_bytes(block, policy, tiles)
    if policy.kind != "recompute" and tiles == 1:
        assert peak == backward_saved_bytes(block, policy)


@given(hybrids("ll"), st.integers(0, 20), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_linear_layers_offload_what_the_formulas_say(shape, percent, tokens):
    """Gradients are bit for bit the same; which buffers fit depends on the order in which the layer saves them."""
    policy, layer = LayerPolicy("offload", ratio=percent / 20), Layer(shape, 0)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    cos, sin = rotary_angles(shape, torch.arange(tokens))
    found = []
    for given_policy, tier in ((LayerPolicy("keep"), None), (policy, Buffers())):
        (run,) = layer_runs(MemoryPolicy((given_policy,)), 1, tier=tier)
        x = torch.ones(1, tokens, 24).cumsum(1).cos().requires_grad_()
        layer.zero_grad()
        layer(x, cos, sin, OneProcess(), run).square().sum().backward()
        found.append([x.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert isinstance(run, Offload)
    assert run.counted.nbytes == host_bytes(Block(shape, 1, tokens, "float32", linear=True), policy)


def test_more_chunks_hold_less():
    """About 1 / D of a layer, beside its input, keys and values."""
    layer = layer_of(groups=4)
    whole = measured(layer, 512, 1, LayerPolicy("keep"), 1)[1]
    fixed = 512 * 4 * (64 + 2 * 16)
    for chunks in (2, 4, 8, 16):
        peak = measured(layer, 512, 1, LayerPolicy("stream", chunks), 1)[1]
        assert peak - fixed == pytest.approx((whole - fixed) / chunks, rel=0.12)


@given(st.integers(0, 20), st.integers(1, 40), st.booleans(), st.integers(1, 3))
@example(10, 1, True, 2)  # what fits last depends on the order in which the layer saves
@settings(max_examples=30)
def test_offloaded_gradients_are_bit_identical_and_bytes_counted(percent, tokens, qk_norm, tiles):
    ratio = percent / 20
    first, second = layer_of(qk_norm), layer_of(qk_norm)
    x = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(tokens))
    cos, sin = rotary_angles(first.config, torch.arange(tokens))
    attend = partial(attention, layout=SequenceLayout("contiguous", tokens, 1))

    def gradients(layers: str, tier=None):
        runs = layer_runs(MemoryPolicy(parse_layers(layers), tiles), 2, tier=tier)
        leaf = x.clone().requires_grad_()
        for layer in (first, second):
            layer.zero_grad()
        second(first(leaf, cos, sin, attend, runs[0]), cos, sin, attend, runs[1]).square().sum().backward()
        return runs, [leaf.grad, *(p.grad for layer in (first, second) for p in layer.parameters())]

    _, expected = gradients("keep")
    runs, found = gradients(f"offload({ratio})", Buffers())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    block = Block(first.config, 1, tokens, "float32")
    for run in runs:
        assert isinstance(run, Offload) and not list(run.moved), "all of it is free again"
        assert run.counted.nbytes == host_bytes(block, LayerPolicy("offload", ratio=ratio), tiles)


def test_offloaded_layers_come_back_one_ahead():
    events = []

    class Watched(Buffers):
        def fetch(self, stored):
            events.append(stored.numel())
            return super().fetch(stored)

    layers = [layer_of() for _ in range(3)]
    runs = layer_runs(MemoryPolicy(parse_layers("offload(1)")), 3, tier=Watched())
    x = torch.randn(1, 8, 64, requires_grad=True)
    cos, sin = rotary_angles(layers[0].config, torch.arange(8))
    attend = partial(attention, layout=SequenceLayout("contiguous", 8, 1))
    for layer, run in zip(layers, runs, strict=True):
        x = layer(x, cos, sin, attend, run)
    counts = []
    for layer in layers:
        layer.post_attention_layernorm.weight.register_hook(lambda g: counts.append(len(events)) or g)
    x.sum().backward()
    each = len(events) // 3
    assert counts == [2 * each, 3 * each, 3 * each], (
        "a layer's backward pass starts with the one before on its way"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloading_on_a_gpu_is_bit_identical():
    from counterpoint.runtime.memory.offload import PinnedHost

    layer, device = layer_of().cuda(), torch.device("cuda", 0)
    x = torch.randn(1, 64, 64, device=device)
    cos, sin = rotary_angles(layer.config, torch.arange(64, device=device))
    found = []
    for layers, tier in (
        ("keep", None),
        ("offload(1)", PinnedHost(device)),
        ("offload(0.5)", PinnedHost(device)),
    ):
        (run,) = layer_runs(MemoryPolicy(parse_layers(layers)), 1, tier=tier)
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        layer(leaf, cos, sin, attention, run).square().sum().backward()
        found.append([leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_without_a_second_memory_offloading_is_refused():
    with pytest.raises(ValueError, match=r"offload\(0.5\) needs a second memory"):
        layer_runs(MemoryPolicy(parse_layers("offload(0.5)")), 2)
