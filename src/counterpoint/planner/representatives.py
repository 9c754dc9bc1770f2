"""A few items that stand for many: k-medoids by eager swaps, and exactly for numbers (FasterPAM, arXiv 2008.05171).

n items, k medoids. d(o, x) stands in row o and column x: what it costs that x stands for o. State per item: nearest and
second nearest medoid and their distances d1, d2. Putting candidate x in the place of medoid m changes the total by

    delta(m, x) = rho(m) + acc(x) + corr_m(x),      rho(m) = sum of d2 - d1 over the items of m,
    acc(x) = sum of min(0, d(o, x) - d1) over all items,
    corr_m(x) = sum over the items of m of d1 - d2 where d(o, x) < d1, d(o, x) - d2 where d1 <= d(o, x) < d2,

so that all m are weighed for x in one pass over the items. Weights multiply every term.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Method = Literal["auto", "exact", "fasterpam", "fastpam1", "fasterclara"]
Dissimilarity = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (a items), (b items) -> (a, b)
EXACT_MOST = 3000  # different numbers for which the exact answer is found by default
MATRIX_MOST = 4000  # items whose whole matrix is made by default


@dataclass(frozen=True, slots=True)
class Representatives:
    """medoids: indices of the items that stand for all. labels: for every item the place of its medoid in `medoids`.
    deviation: the weighted sum of dissimilarities to them. weights: of the items of every medoid."""

    medoids: tuple[int, ...]
    labels: tuple[int, ...]
    deviation: float
    weights: tuple[float, ...]


def representatives(
    items: Any,
    k: int,
    weights: Sequence[float] | None = None,
    *,
    dissimilarity: Dissimilarity | None = None,
    method: Method = "auto",
    restarts: int = 3,
    seed: int = 0,
) -> Representatives:
    """Choose k of the items; of numbers fewer, where equal ones make fewer do as well.

    items: numbers (their dissimilarity is the difference), a square matrix of dissimilarities, or an array of anything
    with a function `dissimilarity` of two parts of it. weights: how often every item counts, 1 by default. method:
    "exact" (numbers only), "fasterpam" (best of `restarts` random starts), "fastpam1" (always the best swap),
    "fasterclara" (samples, for many items), or "auto". Raises ValueError for anything else.
    """
    data = np.asarray(items)
    if data.ndim == 0 or not len(data):
        raise ValueError("there are no items to choose from")
    n = len(data)
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}; choose between 1 and the {n} items there are")
    w = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != (n,) or not (w >= 0).all() or not w.any():
        raise ValueError(f"give {n} weights of at least 0, one for each item, not all 0")
    numbers = dissimilarity is None and data.ndim == 1
    if dissimilarity is None and not numbers:
        if data.ndim != 2 or data.shape != (n, n):
            raise ValueError(
                f"items of shape {data.shape} are neither numbers nor a square matrix; give a dissimilarity"
            )
        if np.isnan(data).any() or (data < 0).any():
            raise ValueError("a matrix of dissimilarities has no negative entries")
    if method == "auto":
        few = len(np.unique(data)) <= EXACT_MOST if numbers else False
        method = "exact" if few else "fasterpam" if n <= MATRIX_MOST or data.ndim == 2 else "fasterclara"
    if method == "exact":
        if not numbers:
            raise ValueError("the exact method is for numbers; use fasterpam")
        return exact_numbers(data.astype(np.float64), k, w)

    def between(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        if numbers:
            return np.abs(data[rows, None].astype(np.float64) - data[None, columns])
        if dissimilarity is None:
            return data[np.ix_(rows, columns)]
        return np.asarray(dissimilarity(data[rows], data[columns]), dtype=np.float64)

    everything = np.arange(n)
    rng = np.random.default_rng(seed)
    if method == "fasterclara":
        return _fasterclara(between, n, k, w, restarts, rng)
    if method not in ("fasterpam", "fastpam1"):
        raise ValueError(f"method {method!r} is unknown; use exact, fasterpam, fastpam1 or fasterclara")
    matrix = between(everything, everything)
    swaps = fasterpam if method == "fasterpam" else fastpam1
    found = [swaps(matrix, rng.choice(n, k, replace=False), w) for _ in range(max(1, restarts))]
    return min(found, key=lambda r: r.deviation)


class _State:
    """Medoids with the nearest and the second nearest of every item."""

    def __init__(self, d: np.ndarray, medoids: Sequence[int] | np.ndarray, weights: np.ndarray) -> None:
        self.d, self.w = d, weights
        self.medoids = np.array(medoids, dtype=np.int64)
        n = len(d)
        self.near, self.second = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        self.d1, self.d2 = np.zeros(n), np.zeros(n)
        self._assign(np.arange(n))

    def _assign(self, rows: np.ndarray) -> None:
        to = self.d[np.ix_(rows, self.medoids)]
        at = np.arange(len(rows))
        self.near[rows] = to.argmin(axis=1)
        self.d1[rows] = to[at, self.near[rows]]
        if len(self.medoids) == 1:
            self.d2[rows] = np.inf
            return
        to[at, self.near[rows]] = np.inf
        self.second[rows] = to.argmin(axis=1)
        self.d2[rows] = to[at, self.second[rows]]

    def losses(self) -> np.ndarray:
        """rho: by medoid, what its items lose with it."""
        return np.bincount(self.near, self.w * (self.d2 - self.d1), len(self.medoids))

    def deltas(self, x: int, rho: np.ndarray) -> np.ndarray:
        """Change of the total for candidate x in the place of every medoid."""
        dx = self.d[:, x]
        acc = float(np.sum(self.w * np.minimum(0.0, dx - self.d1)))
        corr = np.where(dx < self.d1, self.d1 - self.d2, np.minimum(0.0, dx - self.d2))
        return rho + acc + np.bincount(self.near, self.w * corr, len(self.medoids))

    def all_deltas(self) -> np.ndarray:
        """The same of all candidates, (k, n)."""
        parts, acc = np.zeros((len(self.medoids), len(self.d))), np.zeros(len(self.d))
        for m in range(len(self.medoids)):  # cluster by cluster, which stays in the cache
            mine = np.flatnonzero(self.near == m)
            d, w = self.d[mine], self.w[mine]
            nearer, second = (np.minimum(d, x[mine, None]) - x[mine, None] for x in (self.d1, self.d2))
            gained = w @ nearer
            acc += gained
            parts[m] = w @ second - gained
        return self.losses()[:, None] + acc[None, :] + parts

    def swap(self, place: int, x: int) -> None:
        """Put item x in the place of a medoid."""
        self.medoids[place] = x
        dx = self.d[:, x]
        lost = (self.near == place) | (self.second == place)
        closer, next_closer = ~lost & (dx < self.d1), ~lost & (dx >= self.d1) & (dx < self.d2)
        self.second[closer], self.d2[closer] = self.near[closer], self.d1[closer]
        self.near[closer], self.d1[closer] = place, dx[closer]
        self.second[next_closer], self.d2[next_closer] = place, dx[next_closer]
        self._assign(np.flatnonzero(lost))

    @property
    def total(self) -> float:
        return float(np.sum(self.w * self.d1))

    def result(self) -> Representatives:
        weights = np.bincount(self.near, self.w, len(self.medoids))
        return Representatives(
            tuple(self.medoids.tolist()), tuple(self.near.tolist()), self.total, tuple(weights.tolist())
        )


def fasterpam(d: np.ndarray, medoids: Sequence[int] | np.ndarray, weights: np.ndarray) -> Representatives:
    """Candidates in turn; whichever improves is swapped in at once; until a whole round brings nothing."""
    state, n = _State(d, medoids, weights), len(d)
    if len(state.medoids) == 1:
        return _one(d, weights)
    rho, quiet, x = state.losses(), 0, 0
    chosen = set(state.medoids.tolist())
    least = 1e-12 * max(1.0, state.total)  # rounding must not make it go round in circles
    while quiet < n:
        if x not in chosen:
            delta = state.deltas(x, rho)
            place = int(delta.argmin())
            if delta[place] < -least:
                chosen.remove(int(state.medoids[place]))
                chosen.add(x)
                state.swap(place, x)
                rho, quiet = state.losses(), -1
        x, quiet = (x + 1) % n, quiet + 1
    return state.result()


def fastpam1(d: np.ndarray, medoids: Sequence[int] | np.ndarray, weights: np.ndarray) -> Representatives:
    """Always the best of all swaps: what PAM finds (up to ties), in O(n^2) a step instead of O(k n^2)."""
    state = _State(d, medoids, weights)
    if len(state.medoids) == 1:
        return _one(d, weights)
    least = 1e-12 * max(1.0, state.total)
    while True:
        delta = state.all_deltas()
        delta[:, state.medoids] = np.inf
        place, x = np.unravel_index(int(delta.argmin()), delta.shape)
        if delta[place, x] >= -least:
            return state.result()
        state.swap(int(place), int(x))


def _one(d: np.ndarray, weights: np.ndarray) -> Representatives:
    return _State(d, [int((weights[:, None] * d).sum(axis=0).argmin())], weights).result()


def _fasterclara(
    between: Dissimilarity, n: int, k: int, weights: np.ndarray, restarts: int, rng: np.random.Generator
) -> Representatives:
    """FasterPAM on samples of 80 + 4k items and the best medoids so far; the best on all items wins."""
    best: Representatives | None = None
    size, everything = min(n, 80 + 4 * k), np.arange(n)
    for _ in range(max(10, restarts)):
        sample = set(rng.choice(n, size, replace=False).tolist()) | set(best.medoids if best else ())
        rows = np.array(sorted(sample))
        start = rng.choice(len(rows), k, replace=False)
        if best is not None and rng.random() < 0.5:
            start = np.searchsorted(rows, best.medoids)
        found = fasterpam(between(rows, rows), start, weights[rows])
        medoids = rows[list(found.medoids)]
        to = between(everything, medoids)
        labels = to.argmin(axis=1)
        total = float(np.sum(weights * to[everything, labels]))
        if best is None or total < best.deviation:
            shares = np.bincount(labels, weights, k)
            best = Representatives(
                tuple(medoids.tolist()), tuple(labels.tolist()), total, tuple(shares.tolist())
            )
    assert best is not None
    return best


def exact_numbers(values: np.ndarray, k: int, weights: np.ndarray) -> Representatives:
    """The best medoids of numbers, exactly: neighbours in order belong together, and their weighted median stands
    for them. Dynamic program over the sorted values, O(k n^2)."""
    unique, index = np.unique(values, return_inverse=True)
    w = np.bincount(index, weights, len(unique))
    n, k = len(unique), min(k, len(unique))
    at_weight = np.concatenate([[0.0], np.cumsum(w)])
    at_sum = np.concatenate([[0.0], np.cumsum(w * unique)])
    cost, median = np.full((n, n), np.inf), np.zeros((n, n), dtype=np.int64)
    for j in range(n):  # items i to j, for all i
        i = np.arange(j + 1)
        half = (at_weight[i] + at_weight[j + 1]) / 2
        m = np.clip(np.searchsorted(at_weight, half, side="left") - 1, i, j)
        below = unique[m] * (at_weight[m] - at_weight[i]) - (at_sum[m] - at_sum[i])
        above = (at_sum[j + 1] - at_sum[m + 1]) - unique[m] * (at_weight[j + 1] - at_weight[m + 1])
        cost[i, j], median[i, j] = below + above, m
    best = cost[0].copy()
    cuts = np.zeros((k, n), dtype=np.int64)
    for q in range(1, k):
        new = best.copy()
        cuts[q] = -1  # fewer groups do as well
        for j in range(1, n):
            total = best[:j] + cost[1 : j + 1, j]
            i = int(total.argmin())
            if total[i] < new[j]:
                new[j], cuts[q, j] = total[i], i + 1
        best = new
    groups, j, q = [], n - 1, k - 1
    while j >= 0:
        while q > 0 and cuts[q, j] < 0:
            q -= 1
        i = int(cuts[q, j]) if q > 0 else 0
        groups.append(int(median[i, j]))
        j, q = i - 1, q - 1
    first = {int(u): int(np.flatnonzero(index == u)[0]) for u in groups}
    medoids = [first[u] for u in groups[::-1]]
    left = [i for i in range(len(values)) if i not in set(medoids)]
    medoids += left[: max(0, min(len(values), k) - len(medoids))]
    to = np.abs(values[:, None] - values[None, medoids])
    labels = to.argmin(axis=1)
    total = float(np.sum(weights * to[np.arange(len(values)), labels]))
    shares = np.bincount(labels, weights, len(medoids))
    return Representatives(tuple(medoids), tuple(labels.tolist()), total, tuple(shares.tolist()))
