"""Areas of a mask against the mask written down pair by pair; token sets against plain lists."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.kernels.mask import Area, AttentionMask
from counterpoint.kernels.tokens import Run, Tokens, in_order, union
from support.reference import visible

LENGTH = 36


@st.composite
def token_sets(draw: st.DrawFn, length: int = LENGTH) -> Tokens:
    """Consecutive, strided, in pieces, or in any order."""
    kind = draw(st.sampled_from(["run", "strided", "pieces", "scattered", "shuffled"]))
    if kind in ("run", "strided"):
        step = 1 if kind == "run" else draw(st.integers(2, 5))
        start = draw(st.integers(0, length - 1))
        return Tokens.of([Run(start, draw(st.integers(1, (length - 1 - start) // step + 1)), step)])
    if kind == "pieces":
        cuts = sorted(draw(st.sets(st.integers(0, length), min_size=2, max_size=6)))
        return Tokens.of(Run(a, b - a) for a, b in list(itertools.pairwise(cuts))[::2])
    positions = draw(st.sets(st.integers(0, length - 1), min_size=1))
    order = sorted(positions) if kind == "scattered" else draw(st.permutations(sorted(positions)))
    return Tokens.of(Run(p, 1) for p in order)


@st.composite
def masks(draw: st.DrawFn, length: int = LENGTH) -> AttentionMask:
    cuts = draw(st.sets(st.integers(1, length - 1), max_size=5))
    borders = [0, *sorted(cuts), length]
    documents = tuple(b - a for a, b in itertools.pairwise(borders)) if cuts else ()
    return AttentionMask(draw(st.booleans()), draw(st.none() | st.integers(1, length + 2)), documents)


def pairs(area: Area) -> list[tuple[int, int]]:
    return [
        (area.q_start + i, area.k_start + j)
        for i in range(area.rows)
        for j in range(area.columns)
        if (area.lo is None or j - i >= area.lo) and (area.hi is None or j - i <= area.hi)
    ]


@given(masks(), token_sets(), token_sets(), st.booleans())
def test_areas_are_the_mask(mask: AttentionMask, q: Tokens, k: Tokens, same: bool) -> None:
    k = q if same else k
    seen = visible(LENGTH, mask.causal, mask.window, mask.documents)[q.positions()][:, k.positions()]
    expected = {(i, j) for i, j in seen.nonzero().tolist()}
    areas = mask.areas(q, k)
    found = [pair for area in areas for pair in pairs(area)]
    assert len(found) == len(set(found)), "areas overlap"
    assert set(found) == expected
    for area in areas:
        assert area.pairs == len(pairs(area))
        assert {i for i, _ in pairs(area)} == set(range(area.q_start, area.q_stop)), (
            "a row of an area sees nothing"
        )
        assert not area.causal or area.rows == area.columns
        assert area.full or area.causal or area.lo is not None, "a form that kernels do not know"

    queries = {q.positions()[i] for i, _ in expected}
    keys = {k.positions()[j] for _, j in expected}
    assert set(mask.seeing(q, [k]).positions()) == queries
    needed = mask.seen_by(k, [q]).positions()
    assert keys <= set(needed)
    if mask.window is None or q.runs == (Run(q.runs[0].start, q.count),):
        assert set(needed) == keys


def test_areas_of_a_causal_shard_of_itself_are_one_square() -> None:
    shard = Tokens.of([Run(0, 8), Run(24, 8)])
    assert AttentionMask().areas(shard, shard) == (Area(0, 16, 0, 16, None, 0),)


@given(token_sets(), st.data())
def test_pick_and_locate_are_inverse(tokens: Tokens, data: st.DataObject) -> None:
    positions = tokens.positions()
    borders = sorted(data.draw(st.sets(st.integers(0, len(positions)), max_size=6)))
    ranges = list(itertools.pairwise(borders))[::2]
    part = tokens.pick(ranges)
    assert part.positions() == [p for a, b in ranges for p in positions[a:b]]
    located = [i for a, b in tokens.locate(part) for i in range(a, b)]
    assert [positions[i] for i in located] == part.positions()
    assert all(b < c for (_, b), (c, _) in zip(tokens.locate(part), tokens.locate(part)[1:], strict=False))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30) | st.just([0, 1, 2, 3] * 5))
def test_in_order_lays_every_token_once(owners: list[int]) -> None:
    """Shards of any shape: owners[p] is the shard that holds position p."""
    parts = [Tokens.of(Run(p, 1) for p, owner in enumerate(owners) if owner == i) for i in range(4)]
    merged, places = in_order(tuple(parts))
    positions = merged.positions()
    assert sorted(positions) == list(range(len(owners)))
    used = []
    for part, places_of_part in zip(parts, places, strict=True):
        for first, count, at, stride in places_of_part:
            for x in range(count):
                assert positions[at + x * stride] == part.positions()[first + x]
                used.append(at + x * stride)
    assert sorted(used) == list(range(len(owners)))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30))))
def test_union_covers_the_same_indices(ranges: list[tuple[int, int]]) -> None:
    joined = union(ranges)
    assert {i for a, b in joined for i in range(a, b)} == {i for a, b in ranges for i in range(a, b)}
    assert all(a < b for a, b in joined)
    assert all(b < c for (_, b), (c, _) in itertools.pairwise(joined))


@pytest.mark.parametrize(
    ("options", "said"), [({"window": 0}, "window is 0"), ({"documents": (3, 0)}, "at least 1")]
)
def test_impossible_masks_are_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AttentionMask(**options)
