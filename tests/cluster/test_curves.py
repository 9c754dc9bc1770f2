import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.cluster.curves import Curve


@st.composite
def curves(draw):
    """Curves whose points are physical: more of the same never takes less time."""
    sizes = sorted(draw(st.sets(st.integers(1, 2**30), min_size=1, max_size=6)))
    times = sorted(draw(st.lists(st.floats(1e-6, 1.0), min_size=len(sizes), max_size=len(sizes))))
    return Curve.of((size, size / time) for size, time in zip(sizes, times))


@given(curves())
def test_points_come_back_exactly(curve):
    for size, rate in curve.points:
        assert curve.at(size) == pytest.approx(rate, rel=1e-9)


@given(curves(), st.floats(1, 2**31), st.floats(1, 2**31))
def test_a_larger_size_never_takes_less_time(curve, a, b):
    assert curve.falling_time() is None
    assert curve.seconds(min(a, b)) <= curve.seconds(max(a, b)) * (1 + 1e-9)


@given(curves(), st.floats(1, 2**31))
def test_rates_stay_within_the_points(curve, size):
    assert curve.at(size) <= curve.maximum * (1 + 1e-9)


def test_between_points_the_rate_lies_between_theirs():
    curve = Curve.of([(2**10, 1e6), (2**20, 1e9)])
    rates = [curve.at(2**n) for n in range(10, 21)]
    assert rates == sorted(rates)
    assert curve.at(2**15) == pytest.approx((1e6 * 1e9) ** 0.5)


def test_falling_time_names_the_two_sizes():
    assert Curve.of([(1000, 1.0), (2000, 4.0), (4000, 2.0)]).falling_time() == (1000, 2000)


@given(curves(), st.floats(0, 0.9))
def test_taking_the_latency_out_and_adding_it_again_gives_the_benchmark_time(curve, share):
    latency = share * min(size / rate for size, rate in curve.points)
    flow = curve.without(latency)
    if not curve.is_constant:
        for size, rate in curve.points:
            assert latency + flow.seconds(size) == pytest.approx(size / rate, rel=1e-9)


def test_a_point_faster_than_the_latency_is_refused():
    with pytest.raises(ValueError, match="no longer than the latency of 1e-05 s"):
        Curve.of([(1024, 1e9), (2**20, 1e9)]).without(1e-5)


def test_a_constant_ignores_size():
    assert {Curve.constant(5.0).at(size) for size, _ in itertools.product((0, 1, 1e12), (0,))} == {5.0}
