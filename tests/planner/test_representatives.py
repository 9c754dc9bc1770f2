"""k-medoids: the formula of a swap, optima that are left alone, and exact answers for numbers."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.planner.representatives import _State, fasterpam, fastpam1, representatives


def total(d: np.ndarray, medoids, w: np.ndarray) -> float:
    return float(np.sum(w * d[:, list(medoids)].min(axis=1)))


def cloud(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, 2)) + rng.integers(0, 3, (n, 1)) * 4
    return np.linalg.norm(points[:, None] - points[None], axis=2), rng.uniform(0.5, 3, n)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(8, 30), st.integers(2, 6))
def test_the_change_of_a_swap_is_what_recomputing_says(seed: int, n: int, k: int) -> None:
    d, w = cloud(seed, n)
    state = _State(d, np.random.default_rng(seed).choice(n, k, replace=False), w)
    every = state.all_deltas()
    for x in set(range(n)) - set(state.medoids.tolist()):
        found = state.deltas(x, state.losses())
        for m in range(k):
            medoids = [*state.medoids.tolist()]
            medoids[m] = x
            expected = total(d, medoids, w) - state.total
            assert found[m] == pytest.approx(expected, abs=1e-9)
            assert every[m, x] == pytest.approx(expected, abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(8, 40), st.integers(2, 6))
def test_no_swap_improves_at_the_end(seed: int, n: int, k: int) -> None:
    d, w = cloud(seed, n)
    start = np.random.default_rng(seed).choice(n, k, replace=False)
    for swaps in (fasterpam, fastpam1):
        found = swaps(d, start, w)
        assert found.deviation == pytest.approx(total(d, found.medoids, w))
        assert sum(found.weights) == pytest.approx(w.sum())
        for m in range(k):
            for x in set(range(n)) - set(found.medoids):
                other = [*found.medoids[:m], x, *found.medoids[m + 1 :]]
                assert total(d, other, w) >= found.deviation - 1e-9


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=9), st.data())
def test_numbers_are_represented_exactly(values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    w = np.array(
        data.draw(st.lists(st.integers(1, 5), min_size=len(values), max_size=len(values))), dtype=float
    )
    d = np.abs(np.subtract.outer(values, values)).astype(float)
    least = min(total(d, chosen, w) for chosen in combinations(range(len(values)), k))
    found = representatives(values, k, w)
    assert found.deviation == pytest.approx(least)
    assert len(set(found.medoids)) == len(found.medoids) <= k  # fewer where fewer do as well
    assert len(found.medoids) == k or least == 0
    assert representatives(values, k, w, method="fasterpam").deviation >= least - 1e-9


def test_samples_do_about_as_well_and_a_function_is_enough() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(1500, 2)) + rng.integers(0, 5, (1500, 1)) * 3

    def far(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.linalg.norm(a[:, None] - b[None], axis=2)

    whole = representatives(points, 8, dissimilarity=far, method="fasterpam")
    sampled = representatives(points, 8, dissimilarity=far, method="fasterclara")
    assert whole.deviation <= sampled.deviation < 1.1 * whole.deviation
    assert representatives(points, 8, dissimilarity=far, method="fasterclara") == sampled


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 1), "no items"), (([1, 2], 3), "k is 3; choose between 1 and the 2"), (([1, 2], 0), "k is 0"),
        (([1, 2], 1, [1]), "give 2 weights"), (([[1, 2, 3], [4, 5, 6]], 1), "neither numbers nor a square matrix"),
        (([[0, -1], [1, 0]], 1), "no negative"),
    ],
)  # fmt: skip
def test_mistakes(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        representatives(*arguments)
