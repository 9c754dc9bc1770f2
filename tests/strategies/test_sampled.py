"""Combinations drawn at random: meshes of one to three axes, forward and backward chosen apart, options, odd shapes."""

from __future__ import annotations

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from support.cases import Case, planned, run_case

RINGS = ("ring", "ring(way=-1)", "bidirectional_ring")
TOKENRINGS = ("tokenring", "tokenring(packets=2)", "tokenring(packets=5, relay=false)")
STRATEGIES = st.sampled_from(
    [*RINGS, *TOKENRINGS, "allgather", "ulysses", "rsa", "rsa(reduce=reduce_scatter)"]
)
ROUNDING = ("ring", "bidirectional_ring", "tokenring", "allgather")
ROUNDED = st.sampled_from(
    [*(f"{name}(wire_dtype=bfloat16)" for name in ROUNDING), "tokenring(packets=3, wire_dtype=bfloat16)"]
)
MESHES = [(1,), (2,), (3,), (4,), (5,), (8,), (2, 2), (2, 3), (3, 2), (4, 2), (2, 2, 2), (1, 3), (2, 1, 2)]


@st.composite
def cases(draw: st.DrawFn, strategies=STRATEGIES) -> Case:
    mesh = draw(st.sampled_from(MESHES))
    kv_heads = draw(st.integers(1, 4))
    tokens = draw(st.integers(1, 12) | st.integers(13, 90))
    cuts = sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=5))) if tokens > 1 else []
    borders = [0, *cuts, tokens]
    names = st.lists(strategies, min_size=len(mesh), max_size=len(mesh)).map("/".join)
    forward = draw(names)
    return Case(
        mesh,
        forward,
        draw(st.just(forward) | names),
        kv_heads * draw(st.integers(1, 4)),
        kv_heads,
        tokens,
        draw(st.booleans()),
        draw(st.none() | st.integers(1, 25)),
        tuple(borders[i + 1] - borders[i] for i in range(len(cuts) + 1)) if cuts else (),
        draw(st.sampled_from(["contiguous", "zigzag", "striped", "document-zigzag"])),
        batch=draw(st.integers(1, 2)),
        head_dim=draw(st.sampled_from([4, 8, 12])),
        dtype=draw(st.sampled_from(["float32", "float64"])),
        scale=draw(st.none() | st.just(0.3)),
        wants_lse=draw(st.booleans()),
    )


def possible(case: Case) -> bool:
    """Ulysses needs a query head for every rank of its axes."""
    for choice in (case.forward, case.backward or case.forward):
        ranks = 1
        for size, name in zip(case.mesh, choice.split("/"), strict=True):
            ranks *= size if name == "ulysses" else 1
        if ranks > case.heads:
            return False
    return True


@settings(max_examples=80)
@given(cases())
@example(Case((2, 2), "ulysses/rsa", "rsa/ulysses", 6, 2, 31, dtype="float64"))
@example(
    Case(
        (2, 2, 2),
        "tokenring/ulysses/ring",
        "allgather/bidirectional_ring/tokenring",
        8,
        2,
        50,
        dtype="float64",
    )
)
@example(Case((8,), "tokenring(packets=5, relay=false)", "ring", 6, 3, 3, dtype="float64"))
def test_any_combination_is_exact(case: Case) -> None:
    """In float64 to 1e-12, which no wrong term survives; in float32 to the promised 2e-5."""
    assume(possible(case))
    outcome = run_case(case)
    assert outcome.worst < (1e-12 if case.dtype == "float64" else 2e-5), outcome.errors
    for n in (0, 1):
        assert outcome.sent[n] == outcome.received[n] == planned(outcome.schedules[n])


@settings(max_examples=20)
@given(cases(ROUNDED))
def test_values_rounded_on_the_wire_cost_what_bfloat16_rounds(case: Case) -> None:
    """8 bits of mantissa: 2^-9 of what travelled, per trip."""
    outcome = run_case(case)
    assert outcome.worst < 2e-2, outcome.errors
