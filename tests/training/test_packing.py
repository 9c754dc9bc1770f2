"""Packed sequences hold every token once; labels stay inside documents."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.training.packing import Segment, pack


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9), goes_on=st.booleans(), masking=st.booleans()
)
def test_labels_are_the_next_token_of_the_same_document(lengths, goes_on, masking):
    total = sum(lengths)
    ids = np.arange(100, 100 + total, dtype=np.int32)
    segments = [Segment(part, None) for part in np.split(ids, np.cumsum(lengths)[:-1])]
    if goes_on:
        segments[-1] = Segment(segments[-1].tokens, 7)
    batch = pack(segments, masking)
    assert batch.tokens.shape == batch.labels.shape == (1, total)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.tokens[0].tolist() == ids.tolist()
    expected = [label for n in lengths for label in (*[True] * (n - 1), False)]
    for i, inside in enumerate(expected):
        last = 7 if goes_on and i == total - 1 else -100
        assert batch.labels[0, i] == (ids[i] + 1 if inside else last)
    assert batch.documents == (tuple(lengths) if masking else (total,))
