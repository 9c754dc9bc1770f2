"""Listed links between devices, and the ways over them."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

from counterpoint.cluster.curves import Curve


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of a cable: devices numbered inside the group, capacity (bytes/s), latency (s)."""

    source: int
    destination: int
    bytes_per_second: float
    latency_seconds: float
    level: Literal["package", "node", "island", "cluster"]
    attained: Curve | None = None


@dataclass(frozen=True)
class PairGraph:
    """Directed links among `size` devices; ways are computed when first asked for and kept."""

    size: int
    links: tuple[Link, ...]

    @cached_property
    def _next(self) -> list[dict[int, Link]]:
        out: list[dict[int, Link]] = [{} for _ in range(self.size)]
        for link in self.links:
            out[link.source][link.destination] = link
        return out

    @cached_property
    def _ways(self) -> dict[int, dict[int, tuple[int, ...]]]:
        return {}

    def direct(self, source: int, destination: int) -> Link | None:
        return self._next[source].get(destination)

    def path(self, source: int, destination: int) -> tuple[Link, ...]:
        """Links of the way with the fewest hops; among those the widest, then the lowest device numbers.

        Where the cables are the same both ways, the way back is the way there reversed.
        """
        there = self._way(source, destination)
        back = self._way(destination, source)
        if source > destination and self._worth(back[::-1]) == self._worth(there):
            there = back[::-1]
        return tuple(self._next[a][b] for a, b in pairwise(there))

    def _worth(self, way: tuple[int, ...]) -> tuple[int, float] | None:
        hops = [self._next[a].get(b) for a, b in pairwise(way)]
        widths = [link.bytes_per_second for link in hops if link]
        return (len(hops), min(widths)) if len(widths) == len(hops) else None

    def _way(self, source: int, destination: int) -> tuple[int, ...]:
        if source not in self._ways:
            self._ways[source] = self._all_ways(source)
        return self._ways[source][destination]

    def _all_ways(self, source: int) -> dict[int, tuple[int, ...]]:
        done: dict[int, tuple[int, ...]] = {}
        heap: list[tuple[int, float, tuple[int, ...]]] = [(0, -float("inf"), (source,))]
        while heap:
            hops, narrowest, way = heapq.heappop(heap)
            if way[-1] in done:
                continue
            done[way[-1]] = way
            for neighbour, link in self._next[way[-1]].items():
                if neighbour not in done:
                    heapq.heappush(
                        heap, (hops + 1, max(narrowest, -link.bytes_per_second), (*way, neighbour))
                    )
        return done

    def reachable(self, source: int) -> set[int]:
        """Devices that a message from `source` can get to, `source` included."""
        return set(self._all_ways(source))

    def reaching(self, destination: int) -> set[int]:
        """Devices from which a message can get to `destination`, itself included."""
        backward = PairGraph(
            self.size,
            tuple(
                Link(k.destination, k.source, k.bytes_per_second, k.latency_seconds, k.level)
                for k in self.links
            ),
        )
        return backward.reachable(destination)
