"""What the formulas say a layer saves is what autograd is given to save."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Layer, rotary_angles
from counterpoint.model.shapes import SHAPES, find_shape
from counterpoint.runtime.attention import attention
from counterpoint.strategies.memory.cost import (
    Block,
    backward_saved_bytes,
    chunk_lengths,
    extra,
    forward_flops,
    head_bytes,
    input_bytes,
    kept_tensors,
    layer_parameters,
    model_saved_bytes,
    offloaded_tensors,
    saved_bytes,
    saved_tensors,
    total,
)
from counterpoint.strategies.memory.policy import LayerPolicy, MemoryPolicy
from support.hybrids import OneProcess, hybrids


def small(heads: int, groups: int, family: str, inner: int = 48) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "model_type": family, "vocab_size": 64, "hidden_size": 24, "intermediate_size": inner,
            "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": heads // groups,
            "head_dim": 8,
        }
    )  # fmt: skip


blocks = st.builds(
    lambda heads, groups, family, batch, tokens, dtype: Block(
        small(heads, groups, family), batch, tokens, dtype
    ),
    st.sampled_from([2, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from(["llama", "qwen2", "qwen3"]),
    st.integers(1, 3),
    st.integers(1, 70),
    st.sampled_from(["float32", "bfloat16", "float64"]),
)


def measured(block: Block) -> int:
    """Bytes of all buffers that autograd saves in a layer, parameters and rotary angles apart."""
    dtype = getattr(torch, block.dtype)
    layer = Layer(block.config, 0).to(dtype)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.02)
    x = torch.randn(block.batch, block.tokens, block.config.hidden_size, dtype=dtype, requires_grad=True)
    cos, sin = (t.to(dtype) for t in rotary_angles(block.config, torch.arange(block.tokens)))
    apart = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), cos, sin)}
    found: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x, cos, sin, OneProcess() if block.linear else attention)
    return sum(t.untyped_storage().nbytes() for at, t in found.items() if at not in apart)


@settings(max_examples=25, deadline=None)
@given(blocks)
def test_a_layer_saves_what_the_list_says(block: Block) -> None:
    # 2-byte activations: a float32 copy is saved in the input's place
    ours = total(s for s in saved_tensors(block) if s.name not in ("x", "y") or block.dtype != "bfloat16")
    assert measured(block) == ours == total(saved_tensors(block))


@settings(max_examples=40, deadline=None)
@given(hybrids(), st.integers(1, 2), st.integers(1, 40), st.sampled_from(["float32", "bfloat16", "float64"]))
def test_a_linear_layer_saves_what_the_list_says(
    shape: ModelConfig, batch: int, tokens: int, dtype: str
) -> None:
    block = Block(shape, batch, tokens, dtype, linear=True)
    assert measured(block) == total(saved_tensors(block))


@given(blocks, st.integers(1, 12))
def test_a_stream_of_more_chunks_holds_no_more(block: Block, chunks: int) -> None:
    lengths = chunk_lengths(block.tokens, chunks)
    assert sum(lengths) == block.tokens and min(lengths) >= 1 and len(lengths) <= chunks
    here = backward_saved_bytes(block, LayerPolicy("stream", chunks))
    assert here >= backward_saved_bytes(block, LayerPolicy("stream", chunks + 1))
    assert saved_bytes(block, LayerPolicy("stream", chunks)) == input_bytes(block)


@given(blocks, st.floats(0, 1), st.integers(1, 4))
def test_offloading_takes_whole_buffers_up_to_its_ratio(block: Block, ratio: float, tiles: int) -> None:
    kept, gone = kept_tensors(block, tiles), offloaded_tensors(block, ratio, tiles)
    policy = LayerPolicy("offload", ratio=ratio)
    assert total(gone) <= ratio * total(kept) + 1
    assert saved_bytes(block, policy, tiles) + total(gone) == total(kept)
    assert saved_bytes(block, LayerPolicy("offload", ratio=1.0), tiles) == 0
    assert saved_bytes(block, LayerPolicy("offload"), tiles) == total(kept)
    assert extra(block, policy, tiles).copied_bytes == total(gone)


def test_a_window_and_tiles_lower_what_is_held() -> None:
    block = Block(small(4, 2, "llama", inner=96), 1, 64)
    keep = LayerPolicy("keep")
    assert saved_bytes(block, keep, 4) < saved_bytes(block, keep)
    assert (
        saved_bytes(block, keep, 4) < backward_saved_bytes(block, keep, 4) < backward_saved_bytes(block, keep)
    )
    policy = MemoryPolicy((LayerPolicy("keep"), LayerPolicy("recompute")))
    assert model_saved_bytes(block, policy) == saved_bytes(block, keep) + input_bytes(block)


def test_work_of_a_policy() -> None:
    block = Block(small(4, 2, "llama"), 2, 64)
    weights = layer_parameters(block.config) * 2
    assert extra(block, LayerPolicy("keep")).flops == 0
    assert extra(block, LayerPolicy("recompute")).flops == forward_flops(block)
    one, four = (extra(block, LayerPolicy("stream", n)) for n in (1, 4))
    keys = 2 * 2 * 64 * 2 * 24 * 2 * 8  # the projections of keys and values, once more
    assert one.flops == four.flops == forward_flops(block) + keys
    assert one.weight_bytes == weights + 2 * 24 * 2 * 8 * 2 and four.weight_bytes > 4 * weights
    # causal attention: n (n + 1) / 2 pairs of 4 H D flops in every sequence
    c = block.config
    matrices = layer_parameters(c) - 2 * c.hidden_size
    assert forward_flops(block) == 2 * (2 * 64 * matrices + 4 * (64 * 65 // 2) * 4 * 8)


def test_logits_of_a_chunk() -> None:
    block = Block(small(4, 2, "llama"), 2, 64)
    assert head_bytes(block, None) == 2 * 64 * 64 * 12
    assert head_bytes(block, None, backward=False) == 2 * 64 * 64 * 10
    assert head_bytes(block, 16) == 16 * 64 * 12 and head_bytes(block, 10**6) == head_bytes(block, None)


def test_published_shapes_have_their_published_sizes() -> None:
    billions = {
        "qwen3-4b": 4.02,
        "qwen3-8b": 8.19,
        "qwen3-14b": 14.77,
        "qwen3-32b": 32.76,
        "llama-3-8b": 8.03,
    }
    for name, size in billions.items():
        assert find_shape(name).parameters() / 1e9 == pytest.approx(size, abs=0.005)
    assert all(find_shape(name.upper()).num_hidden_layers > 0 for name in SHAPES)
    with pytest.raises(ValueError, match="neither a known shape"):
        find_shape("qwen3-9b")


@pytest.mark.parametrize(
    ("batch", "tokens", "dtype", "norm"),
    [(0, 4, "float32", "fused"), (1, 0, "float32", "fused"), (1, 4, "int8", "fused"), (1, 4, "float32", "x")],
)
def test_impossible_blocks_are_refused(batch, tokens, dtype, norm) -> None:
    with pytest.raises(ValueError, match=r"give at least 1|floating dtype|norm 'x'"):
        Block(small(2, 1, "llama"), batch, tokens, dtype, norm)
