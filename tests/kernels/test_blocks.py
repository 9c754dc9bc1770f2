"""Block attention, its backward and the merge against one process in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.kernels import plain
from counterpoint.kernels.blocks import attend, attend_backward, merge, output_standing_in, row_delta
from counterpoint.kernels.mask import AttentionMask
from support import reference

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-13}


def tensors(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype, dim: int = 16, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    shapes = [(2, tokens, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=random, dtype=dtype) for shape in shapes]


@settings(max_examples=50)
@given(
    tokens=st.integers(1, 40) | st.integers(200, 600),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 4]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 300),
    cut=st.none() | st.floats(0.1, 0.9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    only_delta=st.booleans(),
)
def test_block(tokens, kv_heads, group, causal, window, cut, dtype, only_delta) -> None:
    first = max(1, int(tokens * cut)) if cut else tokens
    documents = (first, tokens - first) if first < tokens else ()
    q, k, v, dout = tensors(tokens, kv_heads * group, kv_heads, dtype)
    expected = reference.attention(q, k, v, dout, reference.visible(tokens, causal, window, documents))
    mask = AttentionMask(causal, window, documents)
    out, lse = attend(q, k, v, mask)
    assert out.dtype == dtype
    standing = output_standing_in(dout, row_delta(dout, out)) if only_delta else out
    grads = attend_backward(dout, q, k, v, standing, lse, mask)
    assert reference.error(out, expected.out) < TOLERANCE[dtype]
    assert reference.error(lse, expected.lse, 1.0) < TOLERANCE[dtype]
    # Where a query sees one key, dq and dk are rounding errors of terms of size 1 and more that cancel.
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        floor = 1.0 if window == 1 and name != "dv" else 0.1
        assert reference.error(grad, getattr(expected, name), floor) < TOLERANCE[dtype], name


def test_uneven_groups_of_heads() -> None:
    """3, 1 and 2 query heads on three key/value heads, as heads are cut when ranks do not divide them."""
    groups = (3, 1, 2)
    q, k, v, dout = tensors(50, 6, 3, torch.float64)
    of_head = torch.tensor([0, 0, 0, 1, 2, 2])
    seen = reference.visible(50, True, None)
    expected = reference.attention(q, k[:, :, of_head], v[:, :, of_head], dout, seen)
    out, lse = attend(q, k, v, AttentionMask(), groups=groups)
    dq, dk, dv = attend_backward(dout, q, k, v, out, lse, AttentionMask(), groups=groups)
    assert reference.error(out, expected.out) < 1e-13
    assert reference.error(dq, expected.dq) < 1e-13
    for got, each in ((dk, expected.dk), (dv, expected.dv)):
        assert reference.error(got, torch.zeros_like(got).index_add(2, of_head, each)) < 1e-13


@given(st.integers(1, 5), st.booleans(), st.integers(0, 1000))
def test_merge_of_any_split_is_the_whole(parts: int, extreme: bool, seed: int) -> None:
    """Also for scores in the thousands, where exp overflows, and for parts that see nothing."""
    q, k, v, _ = tensors(24, 2, 2, torch.float64, seed=seed)
    q = q * 1e4 if extreme else q
    whole, whole_lse = attend(q, k, v, AttentionMask(causal=False))
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    cuts = [24 * i // parts for i in range(parts + 1)]
    for a, b in [*itertools.pairwise(cuts), (0, 0)]:
        part = (
            attend(q, k[:, a:b], v[:, a:b], AttentionMask(causal=False))
            if a < b
            else (out * 0, lse * 0 - torch.inf)
        )
        merge(out, lse, *part)
    assert reference.error(out, whole) < 1e-12
    assert reference.error(lse, whole_lse) < 1e-12


def test_merge_of_nothing_with_nothing_is_nothing() -> None:
    out, lse = torch.zeros(1, 3, 2, 4), torch.full((1, 3, 2), -torch.inf)
    merge(out, lse, out.clone(), lse.clone())
    assert torch.equal(out, torch.zeros_like(out)) and bool((lse == -torch.inf).all())


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_the_stand_in_for_out_has_the_same_delta(size: float) -> None:
    """For gradients of any size, and rows whose gradient is zero, without overflow."""
    dout = torch.randn(2, 9, 3, 8) * size
    dout[:, 2] = 0
    out = torch.randn(2, 9, 3, 8)
    delta = row_delta(dout, out)
    standing = output_standing_in(dout, delta)
    assert bool(standing.isfinite().all())
    assert torch.allclose(row_delta(dout, standing), delta, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("causal", [True, False])
def test_the_fallback_without_a_flash_kernel_is_exact(causal: bool) -> None:
    """It serves devices and dtypes that have no kernel; strips shorter than the block, so that all of it is used."""
    q, k, v, dout = tensors(50, 4, 2, torch.float32)
    expected = reference.attention(q, k, v, dout, reference.visible(50, causal, None))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    out, lse = plain.forward(*heads_first, causal, None, 0.25, rows=16)
    grads = plain.backward(dout.transpose(1, 2), *heads_first, out, lse, causal, None, 0.25, rows=16)
    assert reference.error(out.transpose(1, 2), expected.out) < 3e-6
    for grad, like in zip(grads, (expected.dq, expected.dk, expected.dv), strict=True):
        assert reference.error(grad.transpose(1, 2), like) < 1e-5
