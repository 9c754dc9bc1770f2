"""Parts of a batch: together they are the whole batch, and labels know their token across borders."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.integrations.sharding import document_lengths, shard_batch
from counterpoint.strategies.sequence.layout import LAYOUTS, SequenceLayout


@given(
    st.sampled_from(LAYOUTS),
    st.integers(1, 5),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.data(),
)
def test_shards_are_the_batch_and_each_label_is_the_next_token(kind, world_size, documents, data):
    tokens = sum(documents)
    layout = SequenceLayout(kind, tokens, world_size, tuple(documents))
    if min(map(layout.local_tokens, range(world_size))) == 0:
        with pytest.raises(ValueError, match=f"{tokens} tokens leave some of {world_size} ranks without any"):
            shard_batch(layout, 0, torch.zeros(1, tokens))
        return
    ids = torch.arange(2 * tokens).reshape(2, tokens)
    labels = ids.masked_fill(
        torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))), -100
    )
    parts = [shard_batch(layout, rank, ids, labels) for rank in range(world_size)]

    def whole(name):
        return layout.unshard([part[name] for part in parts])

    assert torch.equal(whole("input_ids"), ids)
    assert torch.equal(whole("labels")[:, :-1], labels[:, 1:])
    assert (whole("labels")[:, -1] == -100).all()
    expected = torch.cat([torch.arange(n) for n in documents])
    assert torch.equal(whole("position_ids"), expected.expand(2, -1))
    counts = {int(part["num_items_in_batch"]) for part in parts}
    assert counts == {max(1, int((labels[:, 1:] != -100).sum()))}, "every rank divides by the same count"
    assert document_lengths(whole("position_ids")) == (tuple(documents) if len(documents) > 1 else ())


def test_given_positions_are_kept():
    layout = SequenceLayout("zigzag", 6, 2)
    positions = torch.tensor([[10, 11, 12, 0, 1, 2]])
    parts = [shard_batch(layout, rank, torch.zeros(3, 6), None, positions)["position_ids"] for rank in (0, 1)]
    assert torch.equal(layout.unshard(parts), positions.expand(3, -1))
    assert document_lengths(positions) == (3, 3)


def test_what_does_not_fit_is_refused():
    layout = SequenceLayout("zigzag", 6, 2)
    ids = torch.zeros(2, 6)
    with pytest.raises(ValueError, match=r"position_ids must be \(1, 6\) or \(2, 6\).*got \[2, 5\]"):
        shard_batch(layout, 0, ids, None, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"labels are \[2, 5\], but input_ids are \[2, 6\]"):
        shard_batch(layout, 0, ids, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"restart at different places.*batches of one row"):
        document_lengths(torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]]))
    with pytest.raises(ValueError, match=r"must be \(1 or batch, tokens\), got \[3, 1, 4\]"):
        document_lengths(torch.zeros(3, 1, 4))
