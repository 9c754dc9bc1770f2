"""Mistakes in calls of `counterpoint.attention`: a ValueError that says what was given and what fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import counterpoint
from counterpoint.strategies.sequence.layout import SequenceLayout
from support import reference
from support.processes import Pools, mesh


def qkv(heads: int = 4, kv_heads: int = 2, tokens: int = 12, dim: int = 8) -> list[torch.Tensor]:
    return [torch.randn(1, n, tokens, dim) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda q, k, v: (q[0], k, v),
            r"must be \(batch, heads, local_tokens, head_dim\), got q \[4, 12, 8\]",
        ),
        (lambda q, k, v: (q, k, v[:, :1]), "k and v must have the same shape"),
        (lambda q, k, v: (q, k[..., :4], v[..., :4]), r"q \[1, 4, 12, 8\], k \[1, 2, 12, 4\]"),
        (lambda q, k, v: (q, k[:, :, :5], v[:, :, :5]), r"k \[1, 2, 5, 8\]"),
        (lambda q, k, v: (q[:, :3], k, v), "3 heads of q must be a multiple of the 2 heads"),
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), "4 heads of q must be a multiple of the 0 heads"),
        (lambda q, k, v: (q, k.double(), v), "share one floating dtype, got torch.float32, torch.float64"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "share one floating dtype, got torch.int32"),
        (lambda q, k, v: (q[:, :, :0], k[:, :, :0], v[:, :, :0]), "at least 1 token"),
        (lambda q, k, v: (q[:0], k[:0], v[:0]), "at least 1"),
    ],
)
def test_tensors_that_do_not_fit(change, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        counterpoint.attention(*change(*qkv()))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layout": "zig"}, "layout 'zig' is unknown"),
        ({"layout": SequenceLayout("zigzag", 24, 2)}, "the layout is for 2 ranks, the mesh has 1"),
        (
            {"layout": SequenceLayout("zigzag", 13, 1)},
            "rank 0 holds 13 of the layout's 13 tokens, but q has 12",
        ),
        ({"forward": "rings"}, "strategy 'rings' is unknown"),
        ({"backward": "ring(speed=9)"}, "has no option 'speed'"),
        ({"window": -1}, "window is -1"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        counterpoint.attention(*qkv(), **options)


def test_one_process_is_plain_attention() -> None:
    """Whatever strategies were meant for the mesh that is not there."""
    q, k, v = (x.double() for x in qkv(tokens=30))
    expected = reference.attention(
        *(x.transpose(1, 2) for x in (q, k, v, q)),
        reference.visible(30, True, None),  # type: ignore
    )
    for forward in ("tokenring", "ulysses", ("ring", "tokenring"), "rsa"):
        out = counterpoint.attention(q, k, v, forward=forward)
        assert reference.error(out.transpose(1, 2), expected.out) < 1e-12


def mistakes(rank: int) -> list[str]:
    said = []

    def told(action, *args: Any, **options: Any) -> None:
        try:
            action(*args, **options)
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))

    told(counterpoint.attention, *qkv(), mesh=mesh(2), layout=SequenceLayout("zigzag", 12, 4))
    told(counterpoint.attention, *qkv(), mesh=mesh(2), layout=SequenceLayout("zigzag", 26, 2))
    told(counterpoint.attention, *qkv(tokens=12 + 3 * rank), mesh=mesh(2), layout="contiguous")
    told(counterpoint.attention, *qkv(), mesh=mesh(2), forward=("ring", "ring"))
    told(counterpoint.attention, *qkv(1, 1), mesh=mesh(2), forward="ulysses")
    out = counterpoint.attention(*qkv(), mesh=mesh(2))  # the mesh still works
    said.append(str(list(out.shape)))
    return said


@pytest.mark.processes
def test_mistakes_on_a_mesh_leave_it_usable(gloo: Pools) -> None:
    for rank, said in enumerate(gloo(2).run(mistakes)):
        assert "the layout is for 4 ranks, the mesh has 2" in said[0]
        assert f"rank {rank} holds 13 of the layout's 26 tokens, but q has 12" in said[1]
        assert "the ranks hold [12, 15] tokens, but a contiguous layout of 27 tokens gives them [1" in said[2]
        assert "2 strategies (ring, ring) for a mesh with 1 axes" in said[3]
        assert "ulysses cannot split 1 query heads over 2 ranks" in said[4]
        assert said[5] == "[1, 4, 12, 8]"
