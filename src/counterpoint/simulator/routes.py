"""The ways that messages take over a cluster, and the resources on which they meet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from counterpoint.cluster.cluster import Cluster, Route
from counterpoint.simulator.fold import Symmetry
from counterpoint.simulator.program import Array

DEVICE = "device"  # what schedules call the tier that kernels work in

Passes = tuple[int, ...]  # the resources of a route, by number


class Asymmetric(Exception):
    """The cluster does not look the same to ranks whose schedules are alike."""


class Routes:
    """Routes by number, each found once; one per pair of ranks, and one per rank, tier and direction of copies.

    places: the cluster's rank for every rank of the schedules. A route between ranks that stand for others has an
    instance for each of them. Raises Asymmetric when instances differ.
    """

    def __init__(self, cluster: Cluster, places: Sequence[int], symmetry: Symmetry) -> None:
        self.cluster, self.places, self.symmetry = cluster, places, symmetry
        self._instances: list[list[Passes]] = []
        self._arrays: tuple[int, tuple[Array, Array, Array, Array]] | None = None  # of how many routes
        self._pairs: dict[tuple[int, int], tuple] = {}
        self._copies: dict[tuple[int, str, str], int] = {}
        self._orbits: dict[int, list[int]] = {}
        self._costs: dict[tuple[int, int, int], tuple[int, float, float]] = {}
        for rank in symmetry.representatives() if symmetry.folded else ():
            if (
                len({cluster.device(places[symmetry.turned(rank, turn)]).name for turn in symmetry.turns()})
                > 1
            ):
                raise Asymmetric

    def message(self, source: int, destination: int, nbytes: int) -> tuple[int, float, float]:
        """(route, latency in seconds, limit in bytes/s) of a message between two ranks."""
        key = (source, destination, nbytes)
        if key not in self._costs:
            number, route = self.pair(source, destination)
            self._costs[key] = (number, route.latency_seconds, route.flow_bytes_per_second(nbytes))
        return self._costs[key]

    def pair(self, source: int, destination: int) -> tuple:
        """(number, route) from one rank to another."""
        ends = (source, destination)
        if ends not in self._pairs:
            first: Route | None = None
            passes: list[Passes] = []
            for there in zip(self._orbit(source), self._orbit(destination), strict=True):
                route, passed = self.cluster.ways.between(self.places[there[0]], self.places[there[1]])
                first = first or route
                if route.latency_seconds != first.latency_seconds or route.flow != first.flow:
                    raise Asymmetric
                passes.append(passed)
            self._pairs[ends] = (self._add(passes), first)
        return self._pairs[ends]

    def _orbit(self, rank: int) -> list[int]:
        """Where the rank comes to lie by all turns."""
        if rank not in self._orbits:
            self._orbits[rank] = [self.symmetry.turned(rank, turn) for turn in self.symmetry.turns()]
        return self._orbits[rank]

    def copy(self, rank: int, source: str, target: str, nbytes: int) -> tuple[int, float, float]:
        """The same for a copy between memory tiers; copies of one rank in one direction share that way."""
        device = self.cluster.device(self.places[rank])
        outer = target if source == DEVICE else source
        tier = device.memory[0] if outer == DEVICE else device.tier(outer)
        key = (rank, source, target)
        if key not in self._copies:
            way = ("copies", self.places[rank], source, target)
            self._copies[key] = self._add([(self.cluster.ways.number(way, tier.attained.maximum),)])
        moved = nbytes if source != target else 2 * nbytes  # within a tier every byte is read and written
        limit = tier.attained.at(moved) * nbytes / moved if moved else tier.attained.maximum
        return self._copies[key], device.launch_seconds, limit

    def _add(self, instances: list[Passes]) -> int:
        self._instances.append(instances)
        return len(self._instances) - 1

    def arrays(self) -> tuple[Array, Array, Array, Array]:
        """(route_at, route_resources, route_weights, capacity).

        Resources of one capacity that the same routes pass equally often are one constraint, and become one. The
        weight of a route is how many of its instances pass such a resource.
        """
        if self._arrays and self._arrays[0] == len(self._instances):
            return self._arrays[1]
        capacities = self.cluster.ways.capacities
        uses: dict[int, dict[int, int]] = {}
        for number, instances in enumerate(self._instances):
            for passes in instances:
                for resource in passes:
                    routes = uses.setdefault(resource, {})
                    routes[number] = routes.get(number, 0) + 1
        kinds: dict[tuple, int] = {}
        kind_of: dict[int, int] = {}
        for resource, routes in uses.items():
            kind_of[resource] = kinds.setdefault((capacities[resource], tuple(routes.items())), len(kinds))
        counts = [dict(routes) for _, routes in kinds]
        at, resources, weights = [0], [], []
        for number, instances in enumerate(self._instances):
            passed = [sorted({kind_of[resource] for resource in passes}) for passes in instances]
            if any(p != passed[0] for p in passed):
                raise Asymmetric
            resources += passed[0]
            weights += [float(counts[kind][number]) for kind in passed[0]]
            at.append(len(resources))
        capacity = np.array([capacity for capacity, _ in kinds], np.float64)
        made = np.array(at, np.int64), np.array(resources, np.int64), np.array(weights, np.float64), capacity
        self._arrays = len(self._instances), made
        return made
