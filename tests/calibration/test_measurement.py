"""Points and series: which of many times counts, and what a noisy one may not do."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from calibration.made import calibration
from counterpoint.calibration.measurement import KEPT, Calibration, Point, Series, pooled
from counterpoint.calibration.timing import Effort, Share, Stopwatch, sample, spaced

seconds = st.floats(1e-7, 10.0)
times = st.lists(seconds, min_size=1, max_size=200)


@given(times)
def test_a_point_keeps_order_and_ends_of_its_times(values):
    point = Point.of(1, "x", values)
    assert len(point.seconds) == min(KEPT, len(values))
    assert list(point.seconds) == sorted(point.seconds)
    assert (point.best, point.seconds[-1]) == (min(values), max(values))
    assert point.best <= point.quiet <= point.median


def test_disturbed_runs_do_not_count():
    assert Point.of(1, "x", [1.0] * 4 + [7.0] * 16).quiet == 1.0


@given(st.lists(seconds, min_size=2, max_size=12), st.floats(0, 1e-3))
def test_time_never_falls_with_size_and_never_exceeds_what_was_measured(values, overhead):
    series = Series("bytes", tuple(Point.of(1024 << i, "x", [t]) for i, t in enumerate(values)))
    found = series.times()
    assert all(a < b for a, b in pairwise(found))
    assert all(t <= measured for t, measured in zip(found, values, strict=True))
    assert series.curve(overhead).falling_time() is None


@given(st.lists(st.lists(seconds, min_size=1, max_size=10), min_size=1, max_size=4))
def test_pooling_ranks_keeps_all_times(ranks):
    found = pooled([Series("flops", (Point.of(3, "x", own),)) for own in ranks])
    assert found.points[0].seconds == tuple(sorted(t for own in ranks for t in own))


def test_a_calibration_survives_storage():
    kept = calibration()
    assert Calibration.from_json(kept.to_json()) == kept


def test_sampling_times_one_run_even_where_the_clock_is_coarse():
    calls = []
    point = sample(lambda: calls.append(sum(range(1000))), 7, "sum", Effort(0.02, 3, 1))
    took = sum(point.seconds) / len(point.seconds)
    # more calls than samples, since one call is shorter than what is timed at once
    assert len(calls) > 10 * len(point.seconds)
    assert 1e-7 < took < 1e-3


def test_a_long_run_is_not_repeated_beyond_the_budget():
    import time

    point = sample(lambda: time.sleep(0.05), 1, "sleep", Effort(0.01, 3, 1))
    assert 1 <= len(point.seconds) <= 2


def test_own_time_leaves_out_waiting():
    import time

    share = Share()
    took, passed = Stopwatch(own=True, share=share)(lambda: time.sleep(0.05))
    assert took < 0.02 < 0.05 <= passed
    assert share.value < 0.4


@given(st.integers(0, 12), st.integers(1, 18), st.integers(2, 10))
def test_sizes_are_powers_of_two_with_both_ends(low, steps, count):
    sizes = spaced(1 << low, 1 << (low + steps), count)
    assert sizes[0] == 1 << low and sizes[-1] == 1 << (low + steps)
    assert all(n & (n - 1) == 0 for n in sizes) and len(sizes) <= count
