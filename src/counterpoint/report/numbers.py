"""The numbers of one timeline, or of two line by line: what the terminal tables and the page both print."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from counterpoint.report.lanes import transfer_begins
from counterpoint.schedule.timeline import Span, Timeline

CATEGORIES = ("compute", "hidden", "exposed", "idle")


@dataclass(frozen=True, slots=True)
class CategoryLine:
    """Seconds of one category of one rank in each timeline (None: that timeline lacks the rank)."""

    rank: int
    category: str
    seconds: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A span, and when something began to move in it: a posted receive waits for its sender first."""

    span: Span
    begin: float

    @property
    def seconds(self) -> float:
        return self.span.stop - self.begin

    @property
    def waited(self) -> float:
        return self.begin - self.span.start


@dataclass(frozen=True, slots=True)
class StepLine:
    """One step in each timeline (None: it does not occur there)."""

    steps: tuple[Step | None, ...]

    @property
    def span(self) -> Span:
        return next(step.span for step in self.steps if step is not None)

    @property
    def difference(self) -> float:
        """Seconds by which the last timeline's step is longer; a step that is missing counts as zero."""
        first, last = self.steps[0], self.steps[-1]
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

    A receive lasts from when its sender began. Steps of two timelines are the same when rank, stream and
    name agree, in order of occurrence.
    """
    if len(timelines) == 1:
        longest = sorted(_steps(timelines[0]), key=lambda step: -step.seconds)[:count]
        return [StepLine((step,)) for step in longest]
    found: dict[tuple[int, str, str, int], list[Step | None]] = {}
    for index, timeline in enumerate(timelines):
        seen: dict[tuple[int, str, str], int] = defaultdict(int)
        for step in _steps(timeline):
            place = step.span.rank, step.span.stream, step.span.name
            found.setdefault((*place, seen[place]), [None] * len(timelines))[index] = step
            seen[place] += 1
    lines = [StepLine(tuple(steps)) for steps in found.values()]
    return sorted(lines, key=lambda line: -abs(line.difference))[:count]


def _steps(timeline: Timeline) -> list[Step]:
    begins = transfer_begins(timeline.spans)
    return sorted((Step(s, b) for s, b in zip(timeline.spans, begins)), key=lambda step: step.span.start)
