"""Layouts: every token exactly once, fair shares, there and back, positions in documents, balance of causal work."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.kernels.mask import AttentionMask
from counterpoint.strategies.sequence.layout import LAYOUTS, SequenceLayout


@st.composite
def layouts(draw: st.DrawFn, kinds=LAYOUTS) -> SequenceLayout:
    tokens = draw(st.integers(1, 120))
    cuts = draw(st.sets(st.integers(1, max(1, tokens - 1)), max_size=6)) if tokens > 1 else set()
    borders = [0, *sorted(cuts), tokens]
    documents = tuple(b - a for a, b in itertools.pairwise(borders)) if cuts else ()
    return SequenceLayout(draw(st.sampled_from(kinds)), tokens, draw(st.integers(1, 9)), documents)


@given(layouts())
def test_every_token_is_held_once_in_ascending_order(layout: SequenceLayout) -> None:
    held = [layout.positions(rank) for rank in range(layout.world_size)]
    assert torch.cat(held).sort().values.tolist() == list(range(layout.tokens))
    for rank, positions in enumerate(held):
        assert positions.tolist() == sorted(positions.tolist()) == layout.local(rank).positions()
        assert positions.dtype == torch.int64 and len(positions) == layout.local_tokens(rank)


@given(layouts())
def test_shards_differ_by_few_tokens(layout: SequenceLayout) -> None:
    """One token for a cut into one piece per rank, two for two pieces each, however many documents there are."""
    sizes = [layout.local_tokens(rank) for rank in range(layout.world_size)]
    assert max(sizes) - min(sizes) <= (1 if layout.kind in ("contiguous", "striped") else 2)


@given(layouts(), st.integers(0, 2))
def test_unshard_undoes_shard(layout: SequenceLayout, dim: int) -> None:
    x = torch.arange(4 * layout.tokens * 3).view(*([2] * dim), layout.tokens, -1)
    parts = [layout.shard(x, rank, dim) for rank in range(layout.world_size)]
    assert torch.equal(layout.unshard(parts, dim), x)


@given(layouts())
def test_position_ids_restart_with_every_document(layout: SequenceLayout) -> None:
    lengths = layout.documents or (layout.tokens,)
    whole = torch.cat([torch.arange(n) for n in lengths])
    for rank in range(layout.world_size):
        assert torch.equal(layout.position_ids(rank), whole[layout.positions(rank)])


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_zigzag_gives_every_rank_the_same_causal_work(world_size: int) -> None:
    pieces = 2 * world_size
    layout, mask = SequenceLayout("zigzag", pieces * 5, world_size), AttentionMask()
    everything = [layout.local(rank) for rank in range(world_size)]
    work = [sum(a.pairs for k in everything for a in mask.areas(q, k)) for q in everything]
    assert len(set(work)) == 1
    contiguous = SequenceLayout("contiguous", pieces * 5, world_size)
    tokens = [contiguous.local(rank) for rank in range(world_size)]
    uneven = [sum(a.pairs for k in tokens for a in mask.areas(q, k)) for q in tokens]
    assert uneven[-1] > work[0] > uneven[0] and sum(uneven) == sum(work)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 8))
def test_document_zigzag_balances_every_document(lengths: list[int], world_size: int) -> None:
    """Causal work of a rank: at most that of an equal share plus what the odd tokens of each document cost."""
    layout = SequenceLayout("document-zigzag", sum(lengths), world_size, tuple(lengths))
    mask = AttentionMask(True, None, tuple(lengths))
    everything = [layout.local(rank) for rank in range(world_size)]
    work = [sum(a.pairs for k in everything for a in mask.areas(q, k)) for q in everything]
    assert max(work) - min(work) <= sum(2 * n for n in lengths)


def refused(said: str, *args) -> None:
    with pytest.raises(ValueError, match=said):
        SequenceLayout(*args)


def test_impossible_layouts_are_refused() -> None:
    refused("unknown.*zigzag", "zig-zag", 8, 2)
    refused("at least 1 token", "zigzag", 0, 2)
    refused("at least 1 token and 1 rank", "zigzag", 8, 0)
    refused("sum to 8 tokens, got 2 lengths with sum 7", "zigzag", 8, 2, (3, 4))
    refused("at least 1", "zigzag", 8, 2, (8, 0))
    layout = SequenceLayout("zigzag", 8, 2)
    with pytest.raises(ValueError, match="rank is 2; this layout has ranks 0 to 1"):
        layout.local(2)
    with pytest.raises(ValueError, match="dim 1 has 7 tokens, the layout has 8"):
        layout.shard(torch.zeros(1, 7), 0)
    with pytest.raises(ValueError, match="3 parts for 2 ranks"):
        layout.unshard([torch.zeros(1, 4)] * 3)
