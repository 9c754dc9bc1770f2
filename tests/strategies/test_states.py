"""LASP-2 and LASP-1 equal the recurrence, with one collective of states per pass whose bytes forget the length."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from counterpoint.kernels.kernel import ITEM_BYTES
from counterpoint.schedule.schedule import Collective, Compute, Recv, Send
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.strategies.sequence.linear import LinearProblem, parse_linear
from counterpoint.strategies.sequence.linear_builder import DECAYS, LinearShape
from support.linear import LinearCase, run_linear

STRATEGIES = ("states", "states_chain", "states_chain(ahead=true)")


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("decay", DECAYS)
def test_outputs_and_gradients_equal_the_recurrence(decay: str, ranks: int) -> None:
    for strategy, causal in product(STRATEGIES, (True, False)):
        case = LinearCase(ranks, 35, decay, strategy, causal=causal, batch=2)
        assert run_linear(case).worst < 1e-10, case


@st.composite
def cases(draw: st.DrawFn) -> LinearCase:
    tokens = draw(st.integers(1, 12) | st.integers(13, 150))
    cuts = sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=5))) if tokens > 1 else []
    borders = [0, *cuts, tokens]
    strategies = st.sampled_from(STRATEGIES)
    forward = draw(strategies)
    return LinearCase(
        draw(st.integers(1, 8)),
        tokens,
        draw(st.sampled_from(DECAYS)),
        forward,
        draw(st.just(forward) | strategies),
        draw(st.booleans()),
        tuple(b - a for a, b in pairwise(borders)) if cuts else (),
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 3)),
        key_dim=draw(st.integers(1, 5)),
        value_dim=draw(st.integers(1, 5)),
        scale=draw(st.sampled_from([1.0, 0.3])),
        strength=draw(st.sampled_from([0.01, 1.0, 30.0])),
    )


@settings(max_examples=60)
@given(cases())
@example(LinearCase(5, 3, "vector", documents=(1, 2)))  # ranks without tokens
@example(LinearCase(4, 40, "vector", documents=(3, 2, 30, 5), causal=False))  # one document over four ranks
@example(LinearCase(1, 1300, "scalar", heads=1, strength=0.01))  # several spans of sub-chunks
def test_any_sizes_documents_and_decays(case: LinearCase) -> None:
    assert run_linear(case).worst < 1e-10


@pytest.mark.parametrize("decay", DECAYS)
def test_float32_and_half_precision(decay: str) -> None:
    assert run_linear(LinearCase(4, 200, decay, dtype="float32", strength=0.1)).worst < 2e-5
    assert run_linear(LinearCase(4, 200, decay, dtype="bfloat16", strength=0.1)).worst < 2e-2
    rounded = LinearCase(4, 200, decay, "states(wire_dtype=bfloat16)", dtype="float32", strength=0.1)
    assert run_linear(rounded).worst < 2e-2


def test_decays_of_zero_and_of_one_do_not_overflow() -> None:
    for decay, strength in product(("scalar", "vector"), (1e4, 1e-30)):
        assert (
            run_linear(LinearCase(3, 70, decay, dtype="float32", strength=strength, causal=False)).worst
            < 2e-5
        )


# ---- communication -----------------------------------------------------------------------------------------
def state_bytes(case: LinearCase, wire: str | None = None) -> tuple[int, int]:
    """B H D E e and 4 B H W."""
    per_head = case.key_dim * case.value_dim * ITEM_BYTES[wire or case.dtype]
    width = {"none": 0, "scalar": 1, "vector": case.key_dim}[case.decay]
    return case.batch * case.heads * per_head, case.batch * case.heads * width * ITEM_BYTES[case.dtype]


def expected_bytes(case: LinearCase, r: int, backward: bool, wire: str | None) -> int:
    state, decay = state_bytes(case, wire)
    right, left = case.ranks - 1 - r, r
    to_right = right * (state + (decay if left else 0))  # the first rank lets nothing through
    to_left = left * (state + (decay if right else 0))
    return to_right + to_left if not case.causal else (to_left if backward else to_right)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("ranks", [2, 5, 8])
def test_one_collective_per_pass_with_the_bytes_of_the_formula(decay: str, ranks: int, causal: bool) -> None:
    for wire in (None, "bfloat16"):
        strategy = f"states(wire_dtype={wire})" if wire else "states"
        for tokens in (32, 320):  # the same bytes whatever the length
            case = LinearCase(ranks, tokens, decay, strategy, causal=causal, dtype="float32", batch=2)
            outcome = run_linear(case)
            for which, schedules in enumerate(outcome.schedules):
                for r, schedule in enumerate(schedules):
                    messages = [step for step in schedule.steps if isinstance(step, Collective | Send | Recv)]
                    assert len(messages) == 1 and isinstance(messages[0], Collective)
                    expected = expected_bytes(case, r, which == 1, wire)
                    assert sum(schedule.sent_bytes().values()) == expected
                    assert outcome.timelines[which][r].bytes_sent(r) == expected


@pytest.mark.parametrize("decay", DECAYS)
def test_the_chain_passes_one_state_per_rank(decay: str) -> None:
    for tokens in (32, 320):
        case = LinearCase(4, tokens, decay, "states_chain", dtype="float32")
        outcome = run_linear(case)
        alone = case.batch * case.heads * case.key_dim * case.value_dim * 4
        assert [s.sent_bytes() for s in outcome.schedules[0]] == [{1: alone}, {2: alone}, {3: alone}, {}]
        assert [s.sent_bytes() for s in outcome.schedules[1]] == [{}, {0: alone}, {1: alone}, {2: alone}]


def test_states_travel_as_far_as_their_document() -> None:
    case = LinearCase(4, 40, documents=(10, 15, 15))
    sent = [schedule.sent_bytes() for schedule in run_linear(case).schedules[0]]
    assert [list(links) for links in sent] == [[], [2], [3], []]


def test_what_is_sent_can_hide_behind_the_chunk_itself() -> None:
    for which in ("forward", "backward"):
        schedule = LinearCase(4, 64, "vector").problem().schedule(which, 1)
        kinds = [
            type(s.kernel).__name__ if isinstance(s, Compute) else type(s).__name__ for s in schedule.steps
        ]
        inner = next(i for i, kind in enumerate(kinds) if kind.startswith("LinearAttend"))
        assert kinds.index("Collective") < inner
        received = {v.name for v in next(s for s in schedule.steps if isinstance(s, Collective)).writes}
        assert not received & set(schedule.steps[inner].reads)


# ---- bad input ---------------------------------------------------------------------------------------------
def test_impossible_problems_are_refused() -> None:
    shape, states = LinearShape(1, 1, 2, 2), parse_linear("states")
    with pytest.raises(ValueError, match="takes tokens in order, but the layout is zigzag"):
        LinearProblem(shape, SequenceLayout("zigzag", 8, 2), states, states)
    with pytest.raises(ValueError, match="unknown; use one of states, states_chain"):
        parse_linear("ring")
    with pytest.raises(ValueError, match="has no option 'packets'; it has wire_dtype"):
        LinearProblem(shape, SequenceLayout("contiguous", 8, 2), parse_linear("states(packets=2)"), states)
    with pytest.raises(ValueError, match="decay 'exponential' is unknown; use one of none, scalar, vector"):
        LinearShape(1, 1, 2, 2, "exponential")  # type: ignore[arg-type]
