"""Attention masks, described by rule and cut into areas, never materialised.

A mask is a rule on global token positions (causal, sliding window, documents). For the tokens that one block of
attention touches it becomes a few rectangles in local indices, each of one of three forms that kernels know:
full, causal (square, on its diagonal), or band (a sliding window).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

from counterpoint.kernels.tokens import Piece, Run, Tokens, split_at, union


@dataclass(frozen=True, slots=True)
class Area:
    """Queries `q_start` to `q_stop` see keys `k_start` to `k_stop` where lo <= j - i <= hi.

    i and j count from the area's own corner. lo or hi None: no limit on that side. Both None: a full rectangle;
    lo None and hi 0: causal, and then the area is square.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    lo: int | None = None
    hi: int | None = None

    @property
    def rows(self) -> int:
        return self.q_stop - self.q_start

    @property
    def columns(self) -> int:
        return self.k_stop - self.k_start

    @property
    def full(self) -> bool:
        return self.lo is None and self.hi is None

    @property
    def causal(self) -> bool:
        return self.lo is None and self.hi == 0

    @property
    def pairs(self) -> int:
        """Number of (query, key) pairs that see each other."""
        n, m = self.rows, self.columns
        above = n * m if self.hi is None else _pairs_up_to(n, m, self.hi)
        return above - (0 if self.lo is None else _pairs_up_to(n, m, self.lo - 1))

    def label(self) -> str:
        form = "full" if self.full else "causal" if self.causal else f"band[{self.lo},{self.hi}]"
        return f"{form} {self.q_start}:{self.q_stop}x{self.k_start}:{self.k_stop}"


def _pairs_up_to(n: int, m: int, c: int) -> int:
    """How many i < n, j < m have j - i <= c."""
    first = max(0, -c)  # rows above see nothing
    whole = max(first, min(n, m - 1 - c))  # from this row on every column is seen
    if first >= n:
        return 0
    ramp = whole - first
    return ramp * (first + c + 1) + ramp * (ramp - 1) // 2 + (n - whole) * m


@dataclass(frozen=True)
class AttentionMask:
    """Which keys a query sees, by global position.

    causal: keys at or before the query. window: keys less than `window` positions away. documents: lengths of
    the packed documents in order; a query sees its own document only; empty means one document.
    """

    causal: bool = True
    window: int | None = None
    documents: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"window is {self.window}; give a number of tokens of at least 1, or None for no window"
            )
        if any(n < 1 for n in self.documents):
            raise ValueError(f"document lengths must be at least 1, got {min(self.documents)}")

    @cached_property
    def starts(self) -> tuple[int, ...]:
        return (0, *accumulate(self.documents[:-1])) if self.documents else (0,)

    @cached_property
    def _only_causal(self) -> bool:
        return self.causal and self.window is None and len(self.documents) < 2

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.causal, self.window, self.documents))

    def areas(self, q: Tokens, k: Tokens) -> tuple[Area, ...]:
        """The visible part of the block of queries `q` against keys `k`; empty when nothing is visible."""
        if self._only_causal and q and k:
            if q.ends[0] > k.ends[1]:
                return (Area(0, q.count, 0, k.count),)
            if q.ends[1] < k.ends[0]:
                return ()
        return _areas(self, q, k)

    def seen_by(self, k: Tokens, queries: Iterable[Tokens]) -> Tokens:
        """The part of the keys `k` that at least one of the query sets sees."""
        return k.pick(union((a.k_start, a.k_stop) for q in queries for a in self.areas(q, k)))

    def last_queries(self, queries: Iterable[Tokens]) -> list[Tokens]:
        """A few queries that together see the same keys as all: without a window, the last of each document."""
        return self._deciding(queries, max)

    def first_keys(self, keys: Iterable[Tokens]) -> list[Tokens]:
        """A few keys that together are seen by the same queries as all of these: the first of each document."""
        return self._deciding(keys, min)

    def _deciding(self, sets: Iterable[Tokens], extreme: Callable[..., int]) -> list[Tokens]:
        if self.window is not None:
            return list(sets)
        found: dict[int, int] = {}
        for tokens in sets:
            for document, ends in _ends(self, tokens) if len(self.starts) > 1 else [(0, tokens.ends)]:
                if ends:
                    found[document] = extreme(*ends, found.get(document, ends[0]))
        return [Tokens((Run(position, 1),)) for position in found.values()]

    def seeing(self, q: Tokens, keys: Iterable[Tokens]) -> Tokens:
        """The part of the queries `q` that sees at least one key of the key sets."""
        return q.pick(union((a.q_start, a.q_stop) for k in keys for a in self.areas(q, k)))


@lru_cache(maxsize=65536)
def _ends(mask: AttentionMask, tokens: Tokens) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """For every document that the tokens touch, their first and last position in it."""
    ends: dict[int, tuple[int, int]] = {}
    for piece in split_at(tokens, mask.starts):
        first, last = ends.get(piece.document, (piece.run.start, piece.run.last))
        ends[piece.document] = min(first, piece.run.start), max(last, piece.run.last)
    return tuple(ends.items())


@lru_cache(maxsize=65536)
def _areas(mask: AttentionMask, q: Tokens, k: Tokens) -> tuple[Area, ...]:
    by_document: dict[int, tuple[list[Piece], list[Piece]]] = {}
    for side, tokens in enumerate((q, k)):
        for piece in split_at(tokens, mask.starts):
            by_document.setdefault(piece.document, ([], []))[side].append(piece)
    areas: list[Area] = []
    for queries, keys in by_document.values():
        if not queries or not keys:
            continue
        whole = _same_ascending(queries, keys) if mask.causal and mask.window is None else None
        if whole:
            areas.append(whole)
            continue
        found = [a for p in queries for r in keys for a in _block(mask, p, r)]
        areas.extend(_joined(found))
    return tuple(sorted(areas, key=lambda a: (a.q_start, a.k_start)) if len(areas) > 1 else areas)


def _same_ascending(queries: list[Piece], keys: list[Piece]) -> Area | None:
    """One causal square when both sides hold the same tokens in ascending, adjacent order."""
    if [p.run for p in queries] != [p.run for p in keys]:
        return None
    for side in (queries, keys):
        for a, b in pairwise(side):
            if a.run.last >= b.run.start or a.index + a.run.count != b.index:
                return None
    count = sum(p.run.count for p in queries)
    q, k = queries[0].index, keys[0].index
    return Area(q, q + count, k, k + count, None, 0)


def _block(mask: AttentionMask, p: Piece, r: Piece) -> list[Area]:
    """Areas of one run of queries against one run of keys of the same document."""
    if mask.causal and mask.window is None:
        if p.run.start >= r.run.last:
            return [Area(p.index, p.index + p.run.count, r.index, r.index + r.run.count)]
        if p.run.last < r.run.start:
            return []
    steps = {run.step for run in (p.run, r.run) if run.count > 1}
    if len(steps) > 1:  # no common stride: one query, or one key, at a time
        if p.run.count <= r.run.count:
            return [
                a
                for i in range(p.run.count)
                for a in _block(mask, Piece(0, p.index + i, p.run.cut(i, i + 1)), r)
            ]
        return [
            a for j in range(r.run.count) for a in _block(mask, p, Piece(0, r.index + j, r.run.cut(j, j + 1)))
        ]
    step = steps.pop() if steps else 1
    ahead = p.run.start - r.run.start
    lo: int | None = None
    hi: int | None = None
    if mask.causal:
        hi = ahead // step
    if mask.window is not None:
        lo = -((mask.window - 1 - ahead) // step)
        if not mask.causal:
            hi = (ahead + mask.window - 1) // step
    return _shaped(p.index, r.index, p.run.count, r.run.count, lo, hi)


def _shaped(q: int, k: int, n: int, m: int, lo: int | None, hi: int | None) -> list[Area]:
    """Cut the band lo <= j - i <= hi of an n x m block at (q, k) into areas of the three known forms."""
    if lo is not None and hi is not None and lo > hi:
        return []
    first, stop = 0, n
    if hi is not None:
        first = max(first, -hi)
    if lo is not None:
        stop = min(stop, m - lo)
    if first >= stop:
        return []
    left, right = 0, m
    if lo is not None:
        left = max(left, first + lo)
    if hi is not None:
        right = min(right, stop + hi)
    if left >= right:
        return []
    q, k, n, m, shift = q + first, k + left, stop - first, right - left, first - left
    lo = None if lo is None or lo + shift <= 1 - n else lo + shift
    hi = None if hi is None or hi + shift >= m - 1 else hi + shift
    if lo is not None or hi is None:
        return [Area(q, q + n, k, k + m, lo, hi)]
    # A staircase that starts hi columns in: a full strip on its left, a square on the diagonal, full rows below.
    side = min(n, m - hi)
    areas = [Area(q, q + side, k + hi, k + hi + side, None, 0)]
    if hi:
        areas.append(Area(q, q + side, k, k + hi))
    if side < n:
        areas.append(Area(q + side, q + n, k, k + m))
    return areas


def _joined(areas: list[Area]) -> list[Area]:
    """Join full areas that are neighbours along the keys, then along the queries."""
    if len(areas) < 2:
        return areas
    full = sorted((a for a in areas if a.full), key=lambda a: (a.q_start, a.q_stop, a.k_start))
    rows: list[Area] = []
    for a in full:
        b = rows[-1] if rows else None
        if b and (b.q_start, b.q_stop, b.k_stop) == (a.q_start, a.q_stop, a.k_start):
            rows[-1] = Area(b.q_start, b.q_stop, b.k_start, a.k_stop)
        else:
            rows.append(a)
    rows.sort(key=lambda a: (a.k_start, a.k_stop, a.q_start))
    joined: list[Area] = []
    for a in rows:
        b = joined[-1] if joined else None
        if b and (b.k_start, b.k_stop, b.q_stop) == (a.k_start, a.k_stop, a.q_start):
            joined[-1] = Area(b.q_start, a.q_stop, b.k_start, b.k_stop)
        else:
            joined.append(a)
    return joined + [a for a in areas if not a.full]


def one_document(count: int) -> Tokens:
    """`count` consecutive tokens from position 0."""
    return Tokens.of([Run(0, count)])
