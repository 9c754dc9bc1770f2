"""The chunked loss is the plain cross entropy, in value and gradient, and holds a chunk's logits at most."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.model.loss import token_loss


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    chunk=st.integers(1, 50),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_equals_plain_cross_entropy(batch, length, chunk, ignored, seed):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, 8, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(20, 8, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(20, (batch, length), generator=g)
    labels[torch.rand(batch, length, generator=g) < ignored] = -100

    total, count = token_loss(hidden, lambda h: h @ weight.T, labels, chunk)
    plain = F.cross_entropy((hidden @ weight.T).float().flatten(0, 1), labels.flatten(), reduction="sum")
    assert int(count) == int((labels >= 0).sum())
    torch.testing.assert_close(total, plain, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(total, (hidden, weight))
    expected = torch.autograd.grad(plain, (hidden, weight))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_no_more_logits_than_a_chunk_are_kept():
    rows = []

    def head(h):
        rows.append(h.shape[0])
        return h @ torch.ones(4, 6)

    hidden = torch.randn(1, 100, 4, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        total, _ = token_loss(hidden, head, torch.zeros(1, 100, dtype=torch.long), chunk_tokens=16)
    total.backward()
    assert max(rows) == 16
    assert len(rows) == 14, "each of the 7 chunks is computed once forward and once backward"
    assert sum(kept) < 100 * 6, "nothing of the logits' size waits for the backward pass"


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"labels have shape \(1, 3\)"):
        token_loss(torch.zeros(1, 4, 2), lambda h: h, torch.zeros(1, 3, dtype=torch.long))
