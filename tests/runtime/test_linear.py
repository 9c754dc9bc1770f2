"""`counterpoint.linear_attention` on real processes: values, gradients, documents, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterpoint import SequenceLayout, Timeline, linear_attention
from support.linear import recurrence
from support.processes import mesh

DECAYS = ("none", "fixed", "scalar", "vector")


def tensors(decay: str, tokens: int) -> list[Tensor | None]:
    """q, k, v, log_decay, dout of the whole sequence, heads first."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, tokens, 4, dtype=torch.float64).unbind()
    v, dout = torch.randn(2, 2, 3, tokens, 5, dtype=torch.float64).unbind()
    shape = {"none": None, "fixed": (3,), "scalar": (2, 3, tokens), "vector": (2, 3, tokens, 4)}[decay]
    g = None if shape is None else -torch.rand(shape, dtype=torch.float64)
    return [q, k, v, g, dout]


def expected(decay: str, tokens: int, documents: tuple[int, ...], causal: bool) -> list[Tensor | None]:
    """out, dq, dk, dv, dlog_decay of one process."""
    q, k, v, g, dout = tensors(decay, tokens)
    inputs = [x.requires_grad_() for x in (q, k, v, g) if x is not None]
    gates = None
    if g is not None:
        gates = g[None, :, None].expand(2, 3, tokens) if decay == "fixed" else g
        gates = (gates if gates.ndim == 4 else gates.unsqueeze(-1)).transpose(1, 2)
    out = recurrence(*(x.transpose(1, 2) for x in inputs[:3]), gates, documents, causal).transpose(1, 2)  # type: ignore[misc]
    grads = [*torch.autograd.grad(out, inputs, dout), None]
    return [out.detach(), *grads[:4]]


def sharded(
    rank: int, shape: tuple[int, ...], decay: str, tokens: int, documents, causal: bool, strategy: str
):
    """This rank's worst difference from one process."""
    ranks = torch.tensor(shape).prod().item()
    layout = SequenceLayout("contiguous", tokens, int(ranks), documents)
    *inputs, dout = tensors(decay, tokens)
    split = [x is not None and x.ndim > 1 for x in inputs]
    local = [layout.shard(x, rank, 2) if s else x for x, s in zip(inputs, split, strict=True)]
    q, k, v, g = (None if x is None else x.clone().requires_grad_() for x in local)
    timeline = Timeline()
    where = {"mesh": mesh(*shape), "layout": layout if documents else None}
    out = linear_attention(q, k, v, g, **where, causal=causal, forward=strategy, timeline=timeline)
    out.backward(layout.shard(dout, rank, 2))
    if g is not None and not split[3]:
        torch.distributed.all_reduce(g.grad)  # every rank holds its own tokens' part
    assert sum(span.kind == "collective" for span in timeline.spans) <= 2
    worst = 0.0
    for got, whole, s in zip(
        (out.detach(), q.grad, k.grad, v.grad, g if g is None else g.grad),
        expected(decay, tokens, documents, causal),
        (True, *split),
        strict=True,
    ):
        if whole is not None:
            like = layout.shard(whole, rank, 2) if s else whole
            assert got.shape == like.shape and got.dtype == like.dtype
            worst = max(worst, float((got - like).abs().max()) if like.numel() else 0.0)
    return worst


@pytest.mark.processes
@pytest.mark.parametrize("decay", DECAYS)
def test_processes_equal_one(gloo, decay: str) -> None:
    for causal, documents, strategy in (
        (True, (), "states"),
        (False, (4, 30, 7), "states"),
        (True, (41,), "states_chain"),
    ):
        assert max(gloo(3).run(sharded, (3,), decay, 41, documents, causal, strategy)) < 1e-10


@pytest.mark.processes
def test_a_mesh_of_two_axes_and_ranks_without_tokens(gloo) -> None:
    assert max(gloo(4).run(sharded, (2, 2), "vector", 30, (), True, "states")) < 1e-10
    assert max(gloo(4).run(sharded, (4,), "scalar", 3, (), True, "states")) < 1e-10


def test_one_process_needs_no_mesh() -> None:
    q, k, v, g, _ = tensors("vector", 70)
    out = linear_attention(q, k, v, g)
    assert torch.allclose(out, expected("vector", 70, (), True)[0], atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_decay": torch.full((2,), 0.1)}, r"log_decay reaches 0.1, .* must be at most 0"),
        ({"log_decay": torch.full((1, 2, 6), torch.nan)}, r"log_decay reaches nan"),
        ({"log_decay": -torch.ones(1, 2, 5)}, r"give floating numbers of shape \[2\] or \[1, 2, 6\] or"),
        ({"log_decay": -torch.ones(2, dtype=torch.int64)}, r"give floating numbers"),
        ({"k": torch.zeros(1, 1, 6, 4)}, r"q and k must have one shape"),
        ({"v": torch.zeros(1, 2, 6, 4).double()}, r"must share one floating dtype"),
        (
            {"layout": SequenceLayout("contiguous", 7, 1)},
            r"rank 0 holds 7 of the layout's 7 tokens, but q has 6",
        ),
        ({"forward": "ring"}, r"strategy 'ring' is unknown; use one of states, states_chain"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict, message: str) -> None:
    values = {"q": torch.zeros(1, 2, 6, 4), "k": torch.zeros(1, 2, 6, 4), "v": torch.zeros(1, 2, 6, 4)}
    with pytest.raises(ValueError, match=message):
        linear_attention(**(values | change))
