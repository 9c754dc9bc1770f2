"""The numbers of one timeline, or of two line by line: what the terminal tables and the page both print."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from counterpoint.schedule.timeline import Span, Timeline

CATEGORIES = ("compute", "hidden", "exposed", "idle")


@dataclass(frozen=True, slots=True)
class CategoryLine:
    """Seconds of one category of one rank in each timeline (None: that timeline lacks the rank)."""

    rank: int
    category: str
    seconds: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class StepLine:
    """One step in each timeline (None: it does not occur there)."""

    spans: tuple[Span | None, ...]

    @property
    def any(self) -> Span:
        return next(s for s in self.spans if s is not None)

    @property
    def difference(self) -> float:
        """Seconds by which the last timeline's step is longer; a step that is missing counts as zero."""
        first, last = self.spans[0], self.spans[-1]
        return (last.seconds if last else 0.0) - (first.seconds if first else 0.0)


def all_ranks(timelines: list[Timeline]) -> list[int]:
    """Ranks of all timelines, also those that only occur as a destination."""
    ranks = {rank for t in timelines for rank in t.ranks}
    return sorted(ranks | {rank for t in timelines for link in t.bytes_by_link() for rank in link})


def category_lines(timelines: list[Timeline]) -> list[CategoryLine]:
    """`Timeline.categories` of every rank of every timeline, rank by rank."""
    lines = []
    for rank in sorted({rank for t in timelines for rank in t.ranks}):
        values = [t.categories(rank) if rank in t.ranks else {} for t in timelines]
        lines += [CategoryLine(rank, c, tuple(v.get(c) for v in values)) for c in CATEGORIES]
    return lines


def link_lines(timelines: list[Timeline]) -> list[tuple[tuple[int, int], tuple[int, ...]]]:
    """Payload bytes of every link that any of the timelines uses, in each of them."""
    links = [t.bytes_by_link() for t in timelines]
    used = sorted({link for each in links for link in each})
    return [(link, tuple(each.get(link, 0) for each in links)) for link in used]


def longest_steps(timelines: list[Timeline], count: int = 12) -> list[StepLine]:
    """The longest steps of a single timeline; of two, the steps whose durations differ most.

    Steps of two timelines are the same when rank, stream and name agree, in order of occurrence.
    """
    if len(timelines) == 1:
        spans = sorted(timelines[0].spans, key=lambda s: (-s.seconds, s.start, s.rank))
        return [StepLine((s,)) for s in spans[:count]]
    found: dict[tuple[int, str, str, int], list[Span | None]] = {}
    for index, timeline in enumerate(timelines):
        seen: dict[tuple[int, str, str], int] = defaultdict(int)
        for s in sorted(timeline.spans, key=lambda s: s.start):
            occurrence = seen[s.rank, s.stream, s.name]
            seen[s.rank, s.stream, s.name] += 1
            key = (s.rank, s.stream, s.name, occurrence)
            found.setdefault(key, [None] * len(timelines))[index] = s
    lines = [StepLine(tuple(spans)) for spans in found.values()]
    return sorted(lines, key=lambda line: -abs(line.difference))[:count]
