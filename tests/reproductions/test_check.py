"""Tolerances, verdicts, and what happens to a check that cannot be carried out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.emulation.namespaces import Unsupported
from counterpoint.reproductions.bench import Bench
from counterpoint.reproductions.check import EXACTLY, Check, Tolerance, holds, run
from counterpoint.reproductions.show import summary


def check(value: float, got: float, tolerance: Tolerance | None = EXACTLY, note: str = "") -> Check:
    return Check("a claim", value, "ms", "section 1", "simulated", tolerance, lambda bench: got, note)


@given(
    value=st.floats(-1e6, 1e6), got=st.floats(-1e6, 1e6), relative=st.floats(0, 1), absolute=st.floats(0, 1e3)
)
def test_both_sides_hold_exactly_when_each_side_does(
    value: float, got: float, relative: float, absolute: float
):
    both, most, least = (Tolerance(relative, absolute, side) for side in ("both", "at most", "at least"))
    assert both.holds(got, value) == (most.holds(got, value) and least.holds(got, value))
    assert most.holds(got, value) or least.holds(got, value)
    assert both.holds(value, value)


def test_a_tolerance_is_a_share_of_the_claim():
    assert Tolerance(relative=0.1).holds(1.1 - 1e-12, 1.0)
    assert not Tolerance(relative=0.1).holds(1.101, 1.0)
    assert not EXACTLY.holds(1.0 + 1e-15, 1.0)
    assert not Tolerance(absolute=2e-5, side="at most").holds(float("nan"), 0.0)


def test_verdicts():
    failing = replace(check(1.0, 0.0), measure=lambda bench: int("x"))
    found = list(run([check(2.0, 2.0), check(2.0, 3.0), check(2.0, 3.0, None, "why"), failing], Bench({})))
    assert [result.verdict for result in found] == ["holds", "outside", "reported", "failed"]
    assert [result.difference for result in found] == [0.0, 0.5, 0.5, None]
    assert "invalid literal" in found[3].error
    assert [holds(found[i : i + 1]) for i in range(4)] == [True, False, True, False]


def test_what_a_machine_cannot_carry_out_says_nothing_about_the_claim():
    def measure(bench: Bench) -> float:
        raise Unsupported("needs root")

    found = list(run([replace(check(1.0, 0.0), measure=measure), check(2.0, 2.0)], Bench({})))
    assert [result.verdict for result in found] == ["not carried out", "holds"]
    assert found[0].error == "needs root" and found[0].to_json()["got"] is None
    assert holds(found)
    assert (
        summary(found) == "1 of 1 claims come out within their tolerance; not carried out on this machine: 1"
    )


def test_a_figure_without_tolerance_says_why():
    with pytest.raises(AssertionError, match="no reason why"):
        check(1.0, 1.0, None)
