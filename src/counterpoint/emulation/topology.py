"""The wires of a scale model: every link, port and bus of a cluster as a rate-limited pipe, and the ways over them.

Whatever ranks share in the cluster (a resource of its routes) is one wire here: a veth pair with a rate limit on its
sending end, used in one direction. A wire starts in a rank's namespace if only this rank sends into it, and ends in
one if only this rank is reached over it; everything else lies in one namespace more, the fabric, which forwards.
So two flows contend in the scale model exactly where they contend in the cluster.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from counterpoint.cluster.cluster import Cluster, Resource

Pair = tuple[int, int]  # source rank, destination rank


@dataclass(frozen=True, slots=True)
class Flow:
    """Traffic of one ordered pair of ranks, and the most it may take of a wire (bytes/s of payload)."""

    source: int
    destination: int
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class Wire:
    """One direction of a veth pair: from namespace `source` to `target`, shared by flows up to its capacity."""

    name: str
    source: int
    target: int
    bytes_per_second: float
    flows: tuple[Flow, ...]
    resource: Resource | None = None  # None: a way into or out of the fabric, where the cluster has no limit


@dataclass(frozen=True, slots=True)
class Topology:
    """Namespaces 0 to ranks - 1 belong to ranks, number `ranks` is the fabric. ways: indices of wires, in order."""

    ranks: int
    wires: tuple[Wire, ...]
    ways: Mapping[Pair, tuple[int, ...]]

    @property
    def fabric(self) -> int:
        return self.ranks

    def next_wires(self, wire: int) -> dict[Pair, int]:
        """Where the fabric forwards what comes out of a wire."""
        following = {}
        for pair, way in self.ways.items():
            if wire in way[:-1]:
                following[pair] = way[way.index(wire) + 1]
        return following


def build_topology(cluster: Cluster, pair_rates: Mapping[Pair, float]) -> Topology:
    """The wires for all ranks of a cluster.

    pair_rates: most that a pair of ranks attains (bytes/s), where it is less than its links carry.
    """
    ranks = cluster.world_size
    pairs = [(a, b) for a in range(ranks) for b in range(ranks) if a != b]
    hops = {(a, b): [r for r in cluster.route(a, b).resources if r.kind != "pair"] for a, b in pairs}
    rates = {
        pair: min(cluster.route(*pair).bytes_per_second, pair_rates.get(pair, float("inf"))) for pair in pairs
    }
    using: dict[Resource, list[Pair]] = defaultdict(list)
    for pair, resources in hops.items():
        for resource in resources:
            using[resource].append(pair)

    wires: list[Wire] = []
    number: dict[Resource, int] = {}

    def add(
        source: int, target: int, capacity: float, users: list[Pair], resource: Resource | None = None
    ) -> int:
        flows = tuple(Flow(a, b, min(capacity, rates[a, b])) for a, b in users)
        wires.append(Wire(f"w{len(wires)}", source, target, capacity, flows, resource))
        return len(wires) - 1

    for resource, users in using.items():
        sources, targets = {a for a, _ in users}, {b for _, b in users}
        starts = len(sources) == 1 and all(hops[pair][0] == resource for pair in users)
        ends = len(targets) == 1 and all(hops[pair][-1] == resource for pair in users)
        source, target = sources.pop() if starts else ranks, targets.pop() if ends else ranks
        number[resource] = add(source, target, resource.bytes_per_second, users, resource)

    ways = {pair: [number[resource] for resource in resources] for pair, resources in hops.items()}
    for rank in range(ranks):
        leaving = [pair for pair in pairs if pair[0] == rank and wires[ways[pair][0]].source == ranks]
        if leaving:
            enter = add(rank, ranks, sum(rates[pair] for pair in leaving), leaving)
            for pair in leaving:
                ways[pair].insert(0, enter)
        arriving = [pair for pair in pairs if pair[1] == rank and wires[ways[pair][-1]].target == ranks]
        if arriving:
            leave = add(ranks, rank, sum(rates[pair] for pair in arriving), arriving)
            for pair in arriving:
                ways[pair].append(leave)
    return Topology(ranks, tuple(wires), {pair: tuple(way) for pair, way in ways.items()})


def forwarding(topology: Topology, wire: int) -> tuple[dict[int, int], dict[Pair, int]]:
    """(next wire by destination, exceptions by pair) for what comes out of a wire in the fabric."""
    following = topology.next_wires(wire)
    by_destination: dict[int, Counter[int]] = defaultdict(Counter)
    for (_, destination), after in following.items():
        by_destination[destination][after] += 1
    usual = {destination: counts.most_common(1)[0][0] for destination, counts in by_destination.items()}
    return usual, {pair: after for pair, after in following.items() if after != usual[pair[1]]}
