"""`counterpoint.short_convolution`: halos from the left, forward and backward, whoever holds them."""

from __future__ import annotations

from itertools import accumulate, pairwise, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from counterpoint import SequenceLayout, Timeline, short_convolution
from counterpoint.kernels.kernel import TensorSpec
from counterpoint.schedule.check import check
from counterpoint.strategies.sequence.halo import halo_schedule
from support.processes import mesh


def expected(x: Tensor, weight: Tensor, documents: tuple[int, ...]) -> Tensor:
    """torch's own convolution, document by document."""
    borders = [0, *accumulate(documents or (x.shape[1],))]
    outs = []
    for a, b in pairwise(borders):
        padded = F.pad(x[:, a:b].transpose(1, 2), (weight.shape[1] - 1, 0))
        outs.append(F.conv1d(padded, weight.unsqueeze(1), groups=weight.shape[0]).transpose(1, 2))
    return torch.cat(outs, 1)


def sharded(rank: int, ranks: int, tokens: int, width: int, documents: tuple[int, ...]) -> tuple[float, int]:
    """The worst difference from one process, and the bytes that this rank sent forward."""
    torch.manual_seed(0)
    x, dout = torch.randn(2, 2, tokens, 3, dtype=torch.float64).unbind()
    weight = torch.randn(3, width, dtype=torch.float64)
    whole, filters = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = expected(whole, filters, documents)
    y.backward(dout)
    layout = SequenceLayout("contiguous", tokens, ranks, documents)
    own, local = layout.shard(x, rank).requires_grad_(), weight.clone().requires_grad_()
    timeline = Timeline()
    got = short_convolution(own, local, mesh=mesh(ranks), layout=layout, timeline=timeline)
    sent = timeline.bytes_sent(rank)
    got.backward(layout.shard(dout, rank))
    torch.distributed.all_reduce(local.grad)
    pairs = (
        (got, layout.shard(y, rank)),
        (own.grad, layout.shard(whole.grad, rank)),
        (local.grad, filters.grad),
    )
    return max(float((a - b).abs().max()) if b.numel() else 0.0 for a, b in pairs), sent


@pytest.mark.processes
def test_processes_equal_one(gloo) -> None:
    for tokens, width, documents in (
        (20, 4, ()), (20, 4, (7, 1, 12)), (20, 1, ()), (20, 9, (2, 18)), (6, 4, ()), (2, 4, ()),
    ):  # fmt: skip
        results = gloo(4).run(sharded, 4, tokens, width, documents)
        assert max(error for error, _ in results) < 1e-12, (tokens, width, documents)


@pytest.mark.processes
def test_bytes_are_those_of_the_halo_and_forget_the_length(gloo) -> None:
    for tokens in (20, 80):
        assert [sent for _, sent in gloo(4).run(sharded, 4, tokens, 4, ())] == [3 * 2 * 3 * 8] * 3 + [0]


def test_schedules_are_legal_for_any_sizes() -> None:
    spec = TensorSpec((2, 0, 3), "float64")
    for ranks, tokens, width, documents in product(
        range(1, 7), (1, 5, 9, 30), (1, 2, 4, 12), ((), (1,), (3, 1))
    ):
        if sum(documents) < tokens:
            lengths = (*documents, tokens - sum(documents)) if documents else ()
            layout = SequenceLayout("contiguous", tokens, ranks, lengths)
            for which in ("forward", "backward"):
                check([halo_schedule(spec, layout, width, rank, which) for rank in range(ranks)])  # type: ignore[arg-type]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight \(channels, width\), got \[1, 4, 3\] and \[2, 4\]"):
        short_convolution(torch.zeros(1, 4, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="takes tokens in order, but the layout is zigzag"):
        halo_schedule(TensorSpec((1, 0, 3)), SequenceLayout("zigzag", 8, 2), 4, 0, "forward")
