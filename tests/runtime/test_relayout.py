"""Changing layouts over real processes, with gradients."""

from __future__ import annotations

import pytest
import torch

from counterpoint import SequenceLayout, relayout
from support.processes import mesh


@pytest.mark.processes
def test_values_and_gradients_move_to_the_other_layout_and_back(gloo) -> None:
    assert all(gloo(2).run(moved))


def moved(rank: int) -> bool:
    torch.manual_seed(0)
    full, weights = torch.randn(3, 2, 11, 4), torch.randn(3, 2, 11, 4)
    zigzag, striped = SequenceLayout("zigzag", 11, 2), SequenceLayout("striped", 11, 2)
    x = zigzag.shard(full, rank, dim=2).requires_grad_()
    y = relayout(x, zigzag, striped, mesh=mesh(2), dim=2)
    (y * striped.shard(weights, rank, dim=2)).sum().backward()
    assert x.grad is not None
    return torch.equal(y.detach(), striped.shard(full, rank, dim=2)) and torch.equal(
        x.grad, zigzag.shard(weights, rank, dim=2)
    )


def test_a_tensor_of_the_wrong_length_is_refused() -> None:
    layout = SequenceLayout("zigzag", 8, 1)
    with pytest.raises(ValueError, match=r"holds 8 tokens of the zigzag layout, but dim 1 of x has 7"):
        relayout(torch.zeros(1, 7), layout, layout)
