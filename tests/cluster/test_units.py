import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.cluster.units import format_quantity, parse_quantity


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("25 GB/s", "bytes_per_second", 25e9),
        ("200 Gb/s", "bytes_per_second", 25e9),
        ("300Mbit/s", "bytes_per_second", 37.5e6),
        ("1 GiB/s", "bytes_per_second", 2**30),
        ("3 us", "seconds", 3e-6),
        ("15.2 µs", "seconds", 15.2e-6),
        ("10 us", "seconds", 10e-6),
        ("141 GiB", "bytes", 141 * 2**30),
        ("80 GB", "bytes", 80e9),
        ("1_000 B", "bytes", 1000),
        ("312 TFLOP/s", "flops_per_second", 312e12),
        ("312 TFLOPS", "flops_per_second", 312e12),
        ("661 TOP/s", "flops_per_second", 661e12),
        ("1e9", "flops", 1e9),
        (1500, "bytes", 1500),
    ],
)
def test_units(text, dimension, value):
    assert parse_quantity(text, dimension) == value


@pytest.mark.parametrize(
    ("given_value", "dimension", "part"),
    [
        ("25 GB", "bytes_per_second", "is a size, not a bandwidth"),
        ("3 us", "bytes", "is a time, not a size"),
        ("25 Gps", "bytes_per_second", "unknown unit 'Gps'"),
        ("fast", "bytes_per_second", "'fast' is not a quantity"),
        (True, "seconds", "true is not a quantity"),
        (None, "seconds", "nothing is not a quantity"),
        ("1e9999999999999999999 GB", "bytes", "is out of range"),
        ([1], "seconds", "a list is not a quantity"),
    ],
)
def test_a_wrong_unit_is_named_with_an_example_of_a_right_one(given_value, dimension, part):
    with pytest.raises(ValueError, match="give a ") as error:
        parse_quantity(given_value, dimension)
    assert part in str(error.value)


@given(
    st.floats(1e-9, 1e20, allow_nan=False),
    st.sampled_from(["bytes", "bytes_per_second", "seconds", "flops", "flops_per_second"]),
)
def test_what_is_printed_reads_back_within_its_three_digits(value, dimension):
    if dimension != "seconds":
        value = max(value, 1.0)
    assert parse_quantity(format_quantity(value, dimension), dimension) == pytest.approx(value, rel=6e-3)
