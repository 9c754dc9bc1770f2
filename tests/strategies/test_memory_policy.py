"""Memory policies as text: what is written is what is read, and what is wrong is said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.strategies.memory.policy import LayerPolicy, parse_layers

policies = st.one_of(
    st.sampled_from([LayerPolicy("keep"), LayerPolicy("recompute")]),
    st.builds(lambda n: LayerPolicy("stream", chunks=n), st.integers(1, 100)),
    st.builds(lambda r: LayerPolicy("offload", ratio=r / 100), st.integers(0, 100)),
    st.just(LayerPolicy("offload", ratio=None)),
)


@given(st.lists(policies, min_size=1, max_size=6))
def test_text_reads_back(layers):
    assert parse_layers(", ".join(map(str, layers))) == tuple(layers)
    assert parse_layers([str(p) for p in layers]) == tuple(layers)


def test_repeats():
    assert parse_layers("keep*2,stream(8) * 3") == (LayerPolicy(),) * 2 + (LayerPolicy("stream", 8),) * 3
    assert parse_layers(["recompute*2", LayerPolicy()]) == (LayerPolicy("recompute"),) * 2 + (LayerPolicy(),)


def test_a_ratio_that_is_left_open_has_to_be_found_first():
    assert parse_layers("offload, offload(auto) * 2") == (LayerPolicy("offload", ratio=None),) * 3
    with pytest.raises(ValueError, match=r"offload has no ratio yet; give one, as in offload\(0.5\)"):
        _ = LayerPolicy("offload", ratio=None).share


@pytest.mark.parametrize(
    "text, reason",
    [
        ("streem(3)", "'streem\\(3\\)' is not understood; write keep, recompute, stream\\(CHUNKS\\)"),
        ("stream", "'stream' is not understood"),
        ("keep(3)", "not understood"),
        ("keep, ", "'' is not understood"),
        ("keep*0", "not understood"),
        ("stream(0)", "whole number from 1"),
        ("stream(1.5)", "whole number from 1"),
        ("offload(1.5)", "from 0 to 1"),
        ("offload(1.2.3)", "from 0 to 1"),
    ],
)
def test_mistakes_name_the_entry(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_layers(text)
