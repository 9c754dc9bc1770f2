"""FasterPAM (arXiv 2008.05171): its formula, its optima, its speed, and lengths that stand for a batch."""

from __future__ import annotations

import time
from functools import lru_cache

import numpy as np

from counterpoint.planner.representatives import _State, fasterpam, fastpam1, representatives
from counterpoint.reproductions.batches import drawn, flexsp_cost
from counterpoint.reproductions.bench import Bench
from counterpoint.reproductions.check import Check, Reproduction, Tolerance


@lru_cache(maxsize=4)
def cloud(n: int, seed: int = 0) -> np.ndarray:
    """Dissimilarities of points around 20 centres in the plane."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, 2)) + 8 * rng.normal(size=(20, 2))[rng.integers(0, 20, n)]
    return np.linalg.norm(points[:, None] - points[None], axis=2)


def naive_deltas(d: np.ndarray, medoids: np.ndarray) -> np.ndarray:
    """Change of the total for every medoid and candidate by going over all items again, O(k n^2) as in PAM."""
    now = d[:, medoids].min(axis=1).sum()
    found = np.empty((len(medoids), len(d)))
    for m in range(len(medoids)):
        without = np.delete(d[:, medoids], m, axis=1).min(axis=1)
        found[m] = np.minimum(without[:, None], d).sum(axis=0) - now
    return found


def naive_pam(d: np.ndarray, medoids: np.ndarray) -> float:
    medoids = medoids.copy()
    while True:
        delta = naive_deltas(d, medoids)
        delta[:, medoids] = np.inf
        m, x = np.unravel_index(int(delta.argmin()), delta.shape)
        if delta[m, x] >= -1e-9:
            return float(d[:, medoids].min(axis=1).sum())
        medoids[m] = x


def formula_error(bench: Bench) -> float:
    d, worst = cloud(200), 0.0
    for k in (2, 5, 20):
        state = _State(d, np.random.default_rng(k).choice(200, k, replace=False), np.ones(200))
        other = np.setdiff1d(np.arange(200), state.medoids)
        worst = max(worst, float(np.abs(state.all_deltas() - naive_deltas(d, state.medoids))[:, other].max()))
    return worst


def swaps_left(bench: Bench) -> float:
    """The best change that any swap still brings after FasterPAM; 0 when none improves."""
    d, best = cloud(300), 0.0
    for seed in range(3):
        found = fasterpam(d, np.random.default_rng(seed).choice(300, 10, replace=False), np.ones(300))
        best = min(best, float(naive_deltas(d, np.array(found.medoids)).min()))
    return -best if best < -1e-9 else 0.0


def same_as_pam(bench: Bench) -> float:
    d, worst = cloud(200), 0.0
    for seed in range(3):
        start = np.random.default_rng(seed).choice(200, 8, replace=False)
        worst = max(worst, abs(fastpam1(d, start, np.ones(200)).deviation - naive_pam(d, start)))
    return worst


def eager_quality(bench: Bench) -> float:
    """Total of FasterPAM over that of FastPAM1, mean over 10 starts."""
    d, ratios = cloud(500), []
    for seed in range(10):
        start = np.random.default_rng(seed).choice(500, 15, replace=False)
        ratios.append(
            fasterpam(d, start, np.ones(500)).deviation / fastpam1(d, start, np.ones(500)).deviation
        )
    return float(np.mean(ratios))


def over_exact(bench: Bench) -> float:
    """Total of FasterPAM over the exact least, lengths as numbers; at least 1."""
    values = drawn("github-like", 400, 131072)
    return (
        representatives(values, 12, method="fasterpam", restarts=5).deviation
        / representatives(values, 12).deviation
    )


def faster_than_naive(k: int) -> float:
    """Time of one sweep over all swaps, naive over decomposed, n = 2,000."""
    d = cloud(2000)
    medoids = np.random.default_rng(0).choice(2000, k, replace=False)
    begin = time.perf_counter()
    naive_deltas(d, medoids)
    slow = time.perf_counter() - begin
    state = _State(d, medoids, np.ones(2000))
    quick = []
    for _ in range(3):
        begin = time.perf_counter()
        state.all_deltas()
        quick.append(time.perf_counter() - begin)
    return slow / min(quick)


def standing_in(k: int, uniform: bool) -> float:
    """Error of the cost of 20,000 sequences on one rank when k of them stand for all; mean over 5 batches.

    Representatives are chosen by cost, which is what has to come out; uniform sampling counts every one alike.
    """
    group, errors = flexsp_cost().group((0,)), []
    for seed in range(5):
        costs = group.compute(drawn("byted-like", 20_000, 131072, seed))
        if uniform:
            picked = costs[np.random.default_rng(seed).choice(len(costs), k, replace=False)]
            estimate = float(picked.mean() * len(costs))
        else:
            found = representatives(costs, k, method="fasterclara")
            estimate = float(np.dot(costs[list(found.medoids)], found.weights))
        errors.append(abs(estimate / float(costs.sum()) - 1))
    return float(np.mean(errors))


REPRODUCTION = Reproduction(
    "fasterpam",
    "the change of a swap against recomputing, no swap left, PAM's own result, exact answers for numbers, speed over "
    "naive swaps, and lengths that stand for a batch",
    (
        Check("delta(m, x) against recomputing, all m and x: largest difference", 0.0, "", "section 3", "exact",
              Tolerance(absolute=1e-9, side="at most"), formula_error),
        Check("gain of the best swap that FasterPAM leaves", 0.0, "", "section 3.2", "exact", Tolerance(), swaps_left),
        Check("FastPAM1 against naive PAM: difference of totals", 0.0, "", "section 3.1", "exact",
              Tolerance(absolute=1e-9, side="at most"), same_as_pam),
        Check("FasterPAM over FastPAM1: mean total, 10 starts", 1.0, "x", "section 5", "exact",
              Tolerance(relative=0.03), eager_quality),
        Check("numbers: FasterPAM over the exact dynamic program", 1.0, "x", "derived", "exact",
              Tolerance(relative=0.05), over_exact),
        Check("n = 2,000, k = 10: a sweep, naive over decomposed", 2.95, "x", "an independent measurement", "measured",
              None, lambda bench: faster_than_naive(10), "another machine, language and n; the ratio must grow with k"),
        Check("n = 2,000, k = 100: a sweep, naive over decomposed", 20.0, "x", "O(k) of section 3", "measured",
              Tolerance(side="at least"), lambda bench: faster_than_naive(100)),
        Check("20,000 lengths: error of their cost from 32 representatives", 0.02, "", "in a planner", "simulated",
              Tolerance(side="at most"), lambda bench: standing_in(32, False)),
        Check("20,000 lengths: the same from 32 drawn uniformly, at least", 0.02, "", "in a planner", "simulated",
              Tolerance(side="at least"), lambda bench: standing_in(32, True)),
    ),
    ("The GPL-3 package of the authors is not used; agreement with it is not checked here.",),
)  # fmt: skip
