"""Buckets add few tokens; micro-batches are cut evenly. Both against exhaustive search."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.planner.batch_solvers.buckets import (
    cut_evenly,
    even_buckets,
    optimal_buckets,
    quantile_buckets,
    token_error,
)

LENGTHS = st.lists(st.integers(1, 5000), min_size=1, max_size=9)


def cuts(n: int, pieces: int):
    for inner in combinations(range(1, n), pieces - 1):
        yield list(zip((0, *inner), (*inner, n), strict=True))


@given(LENGTHS, st.integers(1, 4))
def test_optimal_buckets_add_the_fewest_tokens(lengths: list[int], count: int) -> None:
    buckets = optimal_buckets(lengths, count)
    assert sorted(i for b in buckets for i in b.sequences) == list(range(len(lengths)))
    for b in buckets:
        assert b.bound == max(lengths[i] for i in b.sequences)
    s = sorted(lengths)
    least = min(
        sum(s[b - 1] * (b - a) for a, b in cut)
        for pieces in range(1, min(count, len(s)) + 1)
        for cut in cuts(len(s), pieces)
    )
    assert sum(b.bound * len(b.sequences) for b in buckets) == least


@given(LENGTHS, st.data())
def test_pieces_are_as_even_as_they_can_be(lengths: list[int], data: st.DataObject) -> None:
    pieces = data.draw(st.integers(1, len(lengths)))
    found = cut_evenly(lengths, pieces)
    assert len(found) == pieces
    assert sorted(i for piece in found for i in piece) == list(range(len(lengths)))
    s = sorted(lengths)
    least = min(max(sum(s[a:b]) for a, b in cut) for cut in cuts(len(s), pieces))
    assert max(sum(lengths[i] for i in piece) for piece in found) == least


def test_on_a_long_tail_rounding_up_adds_ten_times_less_than_even_buckets() -> None:
    rng = np.random.default_rng(0)
    body, tail = rng.lognormal(6.5, 1.0, 512), 8192 * (rng.pareto(1.0, 512) + 1)
    lengths = [int(x) + 1 for x in np.minimum(np.where(rng.random(512) < 0.95, body, tail), 393216)]
    optimal = token_error(lengths, optimal_buckets(lengths))
    assert 10 * optimal < token_error(lengths, even_buckets(lengths))
    assert optimal < token_error(lengths, quantile_buckets(lengths))
