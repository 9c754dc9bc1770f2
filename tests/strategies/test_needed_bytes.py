"""Masks: what nobody sees is not sent. Every link against a count of needed tokens, pair by pair."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support import reference
from support.cases import Case, Links, planned

HEADS, KV_HEADS, D = 4, 2, 8
Q = HEADS * D * 4  # bytes of one token's q, out, dout or dq
KV = 2 * KV_HEADS * D * 4  # of its k and v
LSE = HEADS * 4


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tokens = draw(st.integers(2, 70))
    cuts = sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=4)))
    borders = [0, *cuts, tokens]
    return Case(
        (draw(st.integers(2, 6)),),
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=D,
        tokens=tokens,
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 20)),
        documents=tuple(b - a for a, b in itertools.pairwise(borders)) if cuts else (),
        layout=draw(st.sampled_from(["contiguous", "zigzag", "striped", "document-zigzag"])),
    )


class Seen:
    """Which queries of which rank see which keys of which rank, from the mask written down pair by pair."""

    def __init__(self, case: Case) -> None:
        layout = case.problem().layout
        self.N = case.world_size
        mask = reference.visible(case.tokens, case.causal, case.window, case.documents)
        at = [layout.positions(rank) for rank in range(self.N)]
        self.block = [[mask[at[i]][:, at[j]] for j in range(self.N)] for i in range(self.N)]

    def keys(self, j: int, ranks: list[int]) -> Tensor:
        """Which keys of rank j any query of these ranks sees."""
        none = torch.zeros(self.block[j][j].shape[1], dtype=torch.bool)
        return torch.stack([none, *(self.block[i % self.N][j].any(0) for i in ranks)]).any(0)

    def queries(self, j: int, ranks: list[int]) -> int:
        """How many queries of rank j see any key of these ranks."""
        none = torch.zeros(self.block[j][j].shape[0], dtype=torch.bool)
        return int(torch.stack([none, *(self.block[j][i % self.N].any(1) for i in ranks)]).any(0).sum())


def add(total: Links, source: int, destination: int, nbytes: int, N: int) -> None:
    link = (source % N, destination % N)
    if nbytes:
        total[link] = total.get(link, 0) + int(nbytes)


def ring(seen: Seen, way: int, part: slice | None = None) -> tuple[Links, Links]:
    """A block goes on as long as anybody further sees of it; its gradient goes where anybody sees it, then home."""
    N, forward, backward = seen.N, {}, {}
    for j in range(N):
        count = seen.block[j][j].shape[1]
        half = {None: slice(0, count), "up": slice(0, count // 2), "down": slice(count // 2, count)}[part]  # type: ignore[index]
        for s in range(1, N):
            needed = int(seen.keys(j, [j + way * x for x in range(s, N)])[half].sum())
            for total in (forward, backward):
                add(total, j + way * (s - 1), j + way * s, needed * KV, N)
        seers = [s for s in range(1, N) if seen.keys(j, [j + way * s])[half].any()]
        shared = int(seen.keys(j, [j + way * s for s in seers])[half].sum())
        for s in range(1, max(seers, default=0) + 1):
            add(backward, j + way * (s - 1), j + way * s, shared * KV, N)
        if seers:
            add(backward, j + way * seers[-1], j, shared * KV, N)
    return forward, backward


def bidirectional_ring(seen: Seen) -> tuple[Links, Links]:
    up, down = ring(seen, 1, "up"), ring(seen, -1, "down")  # type: ignore[arg-type]
    return merged(up[0], down[0]), merged(up[1], down[1])


def tokenring(seen: Seen, relay: bool) -> tuple[Links, Links]:
    N, forward, backward = seen.N, {}, {}
    for j in range(N):
        for s in range(1, N):
            further = [j - x for x in range(s, N)] if relay else [j - s]
            needed, source = seen.queries(j, further), j - s + 1 if relay else j
            add(forward, source, j - s, needed * Q, N)
            add(backward, source, j - s, needed * 2 * (Q + LSE), N)
            answered = seen.queries(j, [j - s])
            add(forward, j - s, j, answered * (Q + LSE), N)
            add(backward, j - s, j, answered * Q, N)
    return forward, backward


def allgather(seen: Seen) -> tuple[Links, Links]:
    forward, backward = {}, {}
    for i in range(seen.N):
        for j in set(range(seen.N)) - {i}:
            needed = int(seen.keys(j, [i]).sum())
            add(forward, j, i, needed * KV, seen.N)
            add(backward, j, i, needed * KV, seen.N)
            add(backward, i, j, needed * KV, seen.N)
    return forward, backward


def merged(*parts: Links) -> Links:
    total: Links = {}
    for part in parts:
        for (source, destination), nbytes in part.items():
            add(total, source, destination, nbytes, 1 << 30)
    return total


COUNTS = {
    "ring": lambda seen: ring(seen, 1),
    "ring(way=-1)": lambda seen: ring(seen, -1),
    "bidirectional_ring": bidirectional_ring,
    "tokenring": lambda seen: tokenring(seen, True),
    "tokenring(relay=false)": lambda seen: tokenring(seen, False),
    "allgather": allgather,
}


@pytest.mark.parametrize("strategy", COUNTS)
@settings(max_examples=40)
@given(case=cases())
def test_only_what_is_seen_is_sent(strategy: str, case: Case) -> None:
    case = replace(case, forward=strategy)
    forward, backward = case.schedules()
    expected = COUNTS[strategy](Seen(case))
    assert planned(forward) == dict(sorted(expected[0].items()))
    assert planned(backward) == dict(sorted(expected[1].items()))


def test_documents_that_stay_on_their_rank_cost_nothing() -> None:
    for strategy in COUNTS:
        case = Case((4,), strategy, tokens=64, documents=(16,) * 4, layout="contiguous")
        assert [planned(schedules) for schedules in case.schedules()] == [{}, {}]


def test_a_window_reaches_the_neighbour_only() -> None:
    for strategy in ("ring", "tokenring", "allgather"):
        forward, _ = Case((8,), strategy, tokens=64, window=5, layout="contiguous").schedules()
        assert {(min(link), max(link)) for link in planned(forward)} == {(r, r + 1) for r in range(7)}
