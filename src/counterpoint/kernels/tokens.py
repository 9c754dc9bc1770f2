"""Which tokens a piece of a sequence holds, written down without listing them.

`Tokens` is an ordered set of global token positions, as runs. A rank's shard, the part of it that still has to
travel, the rows that a block of attention touches: all are `Tokens`. Positions in a set are distinct.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache


@dataclass(frozen=True, slots=True)
class Run:
    """`count` positions `start`, `start + step`, ..."""

    start: int
    count: int
    step: int = 1

    @property
    def last(self) -> int:
        return self.start + (self.count - 1) * self.step

    def cut(self, first: int, stop: int) -> Run:
        """Elements `first` to `stop` (exclusive) of the run."""
        return Run(self.start + first * self.step, stop - first, self.step)


@dataclass(frozen=True)
class Tokens:
    """Positions in local order: the concatenation of the runs."""

    runs: tuple[Run, ...] = ()

    @classmethod
    def of(cls, runs: Iterable[Run]) -> Tokens:
        """Drop empty runs and join those that continue each other."""
        joined: list[Run] = []
        for run in runs:
            if not run.count:
                continue
            if joined:
                before = joined[-1]
                gap = run.start - before.last
                steps = {r.step for r in (before, run) if r.count > 1} or {1}
                if steps == {gap}:
                    joined[-1] = Run(before.start, before.count + run.count, gap)
                    continue
            joined.append(run if run.count > 1 else Run(run.start, 1))
        return cls(tuple(joined))

    @cached_property
    def count(self) -> int:
        return sum(run.count for run in self.runs)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The lowest and the highest position; nothing when there are no tokens."""
        return (min(run.start for run in self.runs), max(run.last for run in self.runs)) if self.runs else ()

    def __hash__(self) -> int:
        known = self.__dict__
        if "hash" not in known:  # `cached_property` would take a lock
            known["hash"] = hash(self.runs)
        return known["hash"]

    def __bool__(self) -> bool:
        return bool(self.runs)

    @cached_property
    def _joined(self) -> Tokens:
        """The same tokens with runs joined that continue each other."""
        joined = Tokens.of(self.runs)
        return self if joined == self else joined

    def offsets(self) -> Iterator[tuple[int, Run]]:
        """Each run with the local index of its first token."""
        index = 0
        for run in self.runs:
            yield index, run
            index += run.count

    def shifted(self, by: int) -> Tokens:
        """The same tokens `by` positions further on."""
        return Tokens(tuple(Run(run.start + by, run.count, run.step) for run in self.runs))

    def positions(self) -> list[int]:
        return [p for run in self.runs for p in range(run.start, run.last + 1, run.step)]

    def pick(self, ranges: Iterable[tuple[int, int]]) -> Tokens:
        """The tokens at local indices `start` to `stop` of every range, in this order."""
        ranges = tuple(ranges)
        if ranges == ((0, self.count),):
            return self._joined
        picked = []
        for start, stop in ranges:
            for index, run in self.offsets():
                a, b = max(start, index), min(stop, index + run.count)
                if a < b:
                    picked.append(run.cut(a - index, b - index))
        return Tokens.of(picked)

    def locate(self, part: Tokens) -> tuple[tuple[int, int], ...]:
        """Local index ranges (start, stop) of the tokens of `part`, in the order of `part`, adjacent ones joined."""
        return _locate(self, part)


@lru_cache(maxsize=65536)
def _locate(tokens: Tokens, part: Tokens) -> tuple[tuple[int, int], ...]:
    if part is tokens or part == tokens:
        return ((0, tokens.count),) if tokens else ()
    found: list[tuple[int, int]] = []
    for wanted in part.runs:
        position, left = wanted.start, wanted.count
        while left:
            index, run = next(
                (i, r)
                for i, r in tokens.offsets()
                if r.start <= position <= r.last and (position - r.start) % r.step == 0
            )
            first = (position - run.start) // run.step
            same_step = wanted.step == run.step or run.count == 1
            take = min(left, run.count - first) if same_step else 1
            a, b = index + first, index + first + take
            if found and found[-1][1] == a:
                found[-1] = (found[-1][0], b)
            else:
                found.append((a, b))
            left -= take
            position += take * wanted.step
    return tuple(found)


def union(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sorted, disjoint index ranges covering the same indices."""
    ranges = sorted(ranges)
    if len(ranges) == 1 and ranges[0][0] < ranges[0][1]:
        return (ranges[0],)
    merged: list[tuple[int, int]] = []
    for a, b in ranges:
        if a >= b:
            continue
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return tuple(merged)


@dataclass(frozen=True, slots=True)
class Piece:
    """A run inside one document: local index of its first token, and the run."""

    document: int
    index: int
    run: Run


def split_at(tokens: Tokens, starts: tuple[int, ...]) -> list[Piece]:
    """Cut the runs where a document begins; `starts` are the documents' first positions, the first being 0."""
    if len(starts) == 1:
        return [Piece(0, index, run) for index, run in tokens.offsets()]
    pieces = []
    for index, run in tokens.offsets():
        done = 0
        while done < run.count:
            document = bisect_right(starts, run.start + done * run.step) - 1
            stop = run.count
            if document + 1 < len(starts):
                border = starts[document + 1]
                stop = min(stop, -(-(border - run.start) // run.step))
            pieces.append(Piece(document, index + done, run.cut(done, stop)))
            done = stop
    return pieces


@lru_cache(maxsize=65536)
def in_order(parts: tuple[Tokens, ...]) -> tuple[Tokens, list[list[tuple[int, int, int, int]]]]:
    """Merge shards into one set in ascending order, as far as runs allow.

    Returns the merged tokens and, per part, where its tokens go: (first index in the part, count, first index
    in the merged set, stride in the merged set). Runs of step s that together fill a run of a smaller step are
    interleaved; other runs are laid one after the other by their start.
    """
    entries = [(run, p, index) for p, tokens in enumerate(parts) for index, run in tokens.offsets()]
    entries.sort(key=lambda e: e[0].start)
    whole = _interleaved(entries)
    groups = [entries] if whole else [[e] for e in entries]
    places: list[list[tuple[int, int, int, int]]] = [[] for _ in parts]
    merged, offset = [], 0
    for group in groups:
        first, step = group[0][0].start, (whole.step if whole else group[0][0].step)
        count = sum(run.count for run, _, _ in group)
        for run, p, index in group:
            stride = max(1, run.step // step) if whole else 1
            places[p].append(
                (index, run.count, offset + ((run.start - first) // step if whole else 0), stride)
            )
        merged.append(Run(first, count, step))
        offset += count
    return Tokens.of(merged), places


def _interleaved(entries: list[tuple[Run, int, int]]) -> Run | None:
    """The single run that strided runs of equal step fill together, or None."""
    runs = [run for run, _, _ in entries]
    strides = {run.step for run in runs if run.count > 1}
    if len(runs) < 2 or len(strides) != 1 or strides == {1}:
        return None
    stride, k = strides.pop(), len(runs)
    count = sum(run.count for run in runs)
    if stride % k:
        return None
    step, first = stride // k, runs[0].start
    fills = all(
        run.start == first + i * step and run.count == (count - i + k - 1) // k for i, run in enumerate(runs)
    )
    return Run(first, count, step) if fills else None
