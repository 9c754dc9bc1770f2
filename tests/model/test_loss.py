"""The streamed loss is the plain one, in value and gradient, and holds the logits of a few tokens at most."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from counterpoint.model.loss import streamed_sum, token_logprobs, token_loss


def made(batch, length, ignored, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, 8, generator=g, dtype=dtype, requires_grad=True)
    weight = torch.randn(20, 8, generator=g, dtype=dtype, requires_grad=True)
    labels = torch.randint(20, (batch, length), generator=g)
    labels[torch.rand(batch, length, generator=g) < ignored] = -100
    return hidden, weight, labels


shapes = {
    "batch": st.integers(1, 3),
    "length": st.integers(1, 40),
    "head_tokens": st.one_of(st.none(), st.integers(1, 50)),
    "ignored": st.floats(0, 1),
    "seed": st.integers(0, 99),
}


@given(**shapes)
@settings(max_examples=40)
def test_equals_plain_cross_entropy(batch, length, head_tokens, ignored, seed):
    hidden, weight, labels = made(batch, length, ignored, seed)
    total, count = token_loss(hidden, weight, labels, head_tokens)
    plain = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
    assert int(count) == int((labels >= 0).sum())
    torch.testing.assert_close(total, plain, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(3 * total, (hidden, weight))
    expected = torch.autograd.grad(3 * plain, (hidden, weight))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@given(**shapes)
@settings(max_examples=25)
def test_any_sum_over_tokens_of_log_probabilities(batch, length, head_tokens, ignored, seed):
    """With values beside the tokens, as policy losses need them, and inside a function of the whole sum."""
    hidden, weight, labels = made(batch, length, ignored, seed)
    old = torch.randn(batch, length, dtype=torch.float64)

    def value(logprobs, old):
        return torch.minimum(logprobs.exp() * old, logprobs - old).sum()

    logprobs = F.log_softmax(hidden @ weight.T, -1)
    chosen = logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    kept = labels >= 0
    plain = F.softplus(value(chosen[kept], old[kept]))
    total = F.softplus(streamed_sum(hidden, weight, labels, value, (old,), head_tokens))
    torch.testing.assert_close(total, plain, rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad(total, (hidden, weight))
    expected = torch.autograd.grad(plain, (hidden, weight))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)

    found = token_logprobs(hidden, weight, labels, head_tokens)
    torch.testing.assert_close(found, (chosen * kept).float(), rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """The most elements that any result of an operator has, and how many matrix products run."""

    elements = 0
    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.untyped_storage().nbytes() // out.element_size())
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        return out


def test_no_more_logits_than_asked_for_exist_and_they_are_computed_once():
    hidden = torch.randn(1, 100, 4, requires_grad=True)
    weight = torch.randn(60, 4, requires_grad=True)
    with Largest() as seen:
        total, _ = token_loss(hidden, weight, torch.zeros(1, 100, dtype=torch.long), head_tokens=16)
        total.backward()
    assert seen.elements == 16 * 60
    assert seen.products == 3 * 7, (
        "logits, gradient of the hidden states, gradient of the head: once per chunk"
    )


def test_tokens_without_a_label_never_meet_the_head():
    hidden, weight, labels = made(1, 40, 0.0, 0)
    labels[:, :30] = -100
    with Largest() as seen:
        token_loss(hidden, weight, labels, head_tokens=10)[0].backward()
    assert seen.products == 3


def test_gradients_are_spent_by_the_backward_pass():
    hidden, weight, labels = made(1, 5, 0.0, 0)
    total, _ = token_loss(hidden, weight, labels, 2)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated already"):
        total.backward()


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"labels have shape \(1, 3\)"):
        token_loss(torch.zeros(1, 4, 2), torch.zeros(6, 2), torch.zeros(1, 3, dtype=torch.long))
