"""Names and options of strategies, and problems that cannot be split: one clear line each."""

from __future__ import annotations

import pytest

from counterpoint.strategies.sequence.attention import STRATEGIES, Choice, forward_schedule, parse_choices
from support import grid
from support.cases import Case


def test_every_strategy_is_tested() -> None:
    assert set(STRATEGIES) == set(grid.STRATEGIES)


def test_choices_in_every_form_mean_the_same() -> None:
    expected = (Choice("ring"), Choice("tokenring", (("packets", 4), ("relay", False))))
    assert parse_choices("ring/tokenring(packets=4, relay=false)") == expected
    assert parse_choices(("ring", "tokenring( relay = False,packets=4 )")) == expected
    assert parse_choices([Choice("ring"), expected[1]]) == expected
    assert parse_choices(Choice("ring")) == expected[:1]
    assert parse_choices("/".join(map(str, expected))) == expected
    assert parse_choices("tokenring(wire_dtype=none)") == (Choice("tokenring", (("wire_dtype", None),)),)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"forward": "token-ring"},
            "'token-ring' is unknown; use one of ring, bidirectional_ring, tokenring",
        ),
        ({"forward": "tokenring(packets)"}, "option 'packets' of strategy tokenring has no value"),
        (
            {"forward": "tokenring(packet=2)"},
            "forward strategy tokenring has no option 'packet'; it has packets, relay",
        ),
        (
            {"backward": "ulysses(packets=2)"},
            "backward strategy ulysses has no option 'packets'; it has none",
        ),
        ({"forward": "tokenring(packets=0)"}, "packets is 0; give a number of at least 1"),
        ({"forward": "tokenring(wire_dtype=bf16)"}, "dtype 'bf16' is unknown; use one of"),
        ({"backward": "rsa(reduce=sum)"}, "reduce is 'sum'; use one of all_reduce, reduce_scatter"),
        (
            {"forward": "ring/tokenring"},
            "forward names 2 strategies (ring, tokenring) for a mesh with 1 axes",
        ),
        (
            {"mesh": (2, 2)},
            "forward names 1 strategies (tokenring) for a mesh with 2 axes; give one per axis",
        ),
        (
            {"forward": "ulysses", "heads": 2, "kv_heads": 2},
            "ulysses cannot split 2 query heads over 4 ranks",
        ),
        ({"forward": "ulysses/ulysses", "mesh": (2, 4)}, "ulysses cannot split 4 query heads over 8 ranks"),
        ({"heads": 4, "kv_heads": 3}, "4 query heads over 3 key/value heads"),
        ({"heads": 0}, "must be at least 1"),
        ({"window": 0}, "window is 0"),
        ({"documents": (10, 10)}, "sum to 32 tokens, got 2 lengths with sum 20"),
        (
            {"layout": "zig"},
            "layout 'zig' is unknown; use one of contiguous, zigzag, striped, document-zigzag",
        ),
        ({"tokens": 0}, "at least 1 token"),
        ({"dtype": "float8"}, "dtype 'float8' is unknown"),
    ],
)
def test_impossible_problems_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        Case(**changes).schedules()
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "option", ["ring(way=0)", "ring(way=2)", "tokenring(relay=maybe)", "tokenring(packets=many)"]
)
def test_options_with_impossible_values_are_refused(option: str) -> None:
    name, value = option.split("(")[1].rstrip(")").split("=")
    with pytest.raises(ValueError, match=f"{name} is '?{value}"):
        Case(forward=option).schedules()


def test_a_rank_outside_the_mesh() -> None:
    with pytest.raises(ValueError, match="rank is 4"):
        forward_schedule(Case().problem(), 4)
