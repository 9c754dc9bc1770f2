"""A cluster: devices, and a directed link graph given by levels and counts.

Ranks are numbered depth first: the devices of a package, then the packages of a node, and so on, so the
first n ranks always sit as close together as n ranks can. Links are derived by rule and never stored per
pair of ranks: a pod of thousands of devices costs no more than the description of its levels.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, cast, get_args

from counterpoint.cluster.curves import Curve
from counterpoint.cluster.device import Device
from counterpoint.cluster.graph import Link, PairGraph

LevelName = Literal["package", "node", "island", "cluster"]
LinkKind = Literal["switch", "mesh", "bus", "pairs"]
LEVELS: tuple[str, ...] = get_args(LevelName)
LINK_KINDS: tuple[str, ...] = get_args(LinkKind)


@dataclass(frozen=True, slots=True)
class Level:
    """How the `count` children of a group (devices, or groups of the level inside) are joined.

    switch: each child has `ports` ports, each `bytes_per_second` out and `receive_bytes_per_second` in;
    the devices of a child share its ports in blocks. mesh: a link of `bytes_per_second` for every ordered
    pair of children. bus: one medium of `bytes_per_second` that all traffic of the group shares, both ways.
    pairs: only the `links` listed, between devices numbered inside the group; `forwarding` lets traffic
    pass through devices in between.

    `latency_seconds` is end to end for a message whose outermost level is this one. `attained` is what one
    flow gets over message size (its maximum also bounds all concurrent flows of one ordered pair of ranks).
    `carries_outer`: traffic of the levels outside passes this level's ports or bus as well.
    `oversubscription` says how `bytes_per_second` of a switch was derived from the level inside.
    `collectives`: measured bytes/s (message bytes over time) per collective and number of ranks.
    """

    level: LevelName
    count: int
    link: LinkKind
    bytes_per_second: float
    latency_seconds: float
    name: str = ""
    peak_bytes_per_second: float | None = None
    receive_bytes_per_second: float | None = None
    ports: int = 1
    attained: Curve | None = None
    carries_outer: bool = False
    oversubscription: float | None = None
    links: tuple[Link, ...] = ()
    forwarding: bool = False
    collectives: Mapping[str, Mapping[int, Curve]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return self.name or self.level

    @property
    def receives(self) -> float:
        """Bytes/s that a switch port takes in."""
        return self.receive_bytes_per_second or self.bytes_per_second


@dataclass(frozen=True, slots=True)
class Resource:
    """Something flows share, with its capacity: a port, a link, a bus, or what one pair of ranks can drive.

    `tier` counts levels from the innermost (0). `where` is (child, port) for a port, (group, from, to) for a
    link, (group,) for a bus and (source, destination) for a pair, all numbered over the whole cluster.
    """

    kind: Literal["port", "link", "bus", "pair"]
    tier: int
    where: tuple[int, ...]
    direction: Literal["out", "in", "both"]
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class Route:
    """The way from one rank to another: resources in order, end-to-end latency (s), outermost level."""

    resources: tuple[Resource, ...]
    latency_seconds: float
    level: LevelName
    flow: Curve | None = None

    @property
    def bytes_per_second(self) -> float:
        """Most that a single large message attains."""
        return min(r.bytes_per_second for r in self.resources)

    def flow_bytes_per_second(self, nbytes: float) -> float:
        """Rate of a lone flow of `nbytes` once the latency has passed; a simulator's cap for that flow."""
        capacity = self.bytes_per_second
        return min(capacity, self.flow.at(nbytes)) if self.flow else capacity

    def seconds(self, nbytes: float) -> float:
        """Time (s) of a lone message: latency plus bytes at the attained rate."""
        return self.latency_seconds + (nbytes / self.flow_bytes_per_second(nbytes) if nbytes else 0.0)


class Ways:
    """Routes of a cluster that have been asked for, their resources by number, and the bytes/s of these."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.capacities: dict[int, float] = {}
        self._found: dict[tuple[int, int], tuple[Route, tuple[int, ...]]] = {}
        self._numbers: dict[Hashable, int] = {}
        self._next = itertools.count()

    def between(self, source: int, destination: int) -> tuple[Route, tuple[int, ...]]:
        """The route from one rank to another, and the numbers of its resources."""
        way = self._found.get((source, destination))
        if way is None:
            route = self.cluster.route(source, destination)
            passed = tuple([self.number(r, r.bytes_per_second) for r in route.resources])
            way = self._found[source, destination] = route, passed
        return way

    def number(self, resource: Hashable, capacity: float) -> int:
        """The number of a resource, which may be one that the cluster does not know."""
        number = self._numbers.get(resource)
        if number is None:
            number = self._numbers.setdefault(resource, next(self._next))  # a thread may have been faster
            self.capacities[number] = capacity
        return number


@dataclass(frozen=True)
class Cluster:
    """Devices and levels, innermost level first; see docs/cluster.md for the file format.

    `placement` assigns device types to ranks in runs: (("h100", 8),). `world_size` may be less than the
    places the levels describe; the ranks beyond it are simply not used.
    """

    name: str
    devices: Mapping[str, Device]
    placement: tuple[tuple[str, int], ...]
    levels: tuple[Level, ...]
    world_size: int
    about: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Devices in one group of each level."""
        sizes, total = [], 1
        for level in self.levels:
            total *= level.count
            sizes.append(total)
        return tuple(sizes)

    @property
    def places(self) -> int:
        """Devices that the levels describe; at least world_size."""
        return self.sizes[-1] if self.levels else 1

    @cached_property
    def _flows(self) -> tuple[Curve | None, ...]:
        """What one flow attains at each level once its latency has passed."""
        return tuple(k.attained.without(k.latency_seconds) if k.attained else None for k in self.levels)

    @cached_property
    def _has_bus(self) -> bool:
        return any(level.link == "bus" for level in self.levels)

    @cached_property
    def ways(self) -> Ways:
        return Ways(self)

    def __getstate__(self) -> dict[str, Any]:
        """What makes the cluster; what has been found about it stays here."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def _sides(self) -> dict[tuple[int, int, str], tuple[Resource, ...]]:
        """Those that have been asked for."""
        return {}

    @cached_property
    def _graphs(self) -> dict[int, PairGraph]:
        """For every level of listed pairs: its links and, joined in, those of the levels inside."""
        graphs = {}
        for tier, level in enumerate(self.levels):
            if level.link == "pairs":
                links = list(level.links)
                for inner, inside in enumerate(self.levels[:tier]):
                    for group in range(self.sizes[tier] // self.sizes[inner]):
                        links += self._links_inside(inner, inside, group * self.sizes[inner])
                graphs[tier] = PairGraph(self.sizes[tier], tuple(links))
        return graphs

    def graph(self, tier: int) -> PairGraph:
        """Links among the devices of one group of a level of listed pairs."""
        return self._graphs[tier]

    def _links_inside(self, tier: int, level: Level, first: int) -> list[Link]:
        """The links of a group of an inner level, as links between device numbers from `first` on."""
        if level.link == "pairs":
            own = level.links
        else:
            bandwidth = level.attained.maximum if level.attained else level.bytes_per_second
            bandwidth = min(bandwidth, level.bytes_per_second)
            step = self.sizes[tier - 1] if tier else 1
            own = tuple(
                Link(a, b, bandwidth, level.latency_seconds, level.level)
                for a in range(self.sizes[tier])
                for b in range(self.sizes[tier])
                if a // step != b // step
            )
        return [
            replace(link, source=link.source + first, destination=link.destination + first) for link in own
        ]

    def device(self, rank: int) -> Device:
        """The device of a rank.

        Raises:
            ValueError: the cluster has no such rank.
        """
        self._check(rank)
        end = 0
        for name, count in self.placement:
            end += count
            if rank < end:
                return self.devices[name]
        raise AssertionError(f"placement covers {end} of {self.world_size} ranks")

    def _check(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise ValueError(
                f"cluster {self.name} has ranks 0 to {self.world_size - 1}; rank {rank} was asked for"
            )

    def tier(self, ranks: Sequence[int]) -> int:
        """Number of the innermost level (0 is the innermost) that has all these ranks in one group."""
        low, high = min(ranks), max(ranks)
        self._check(low)
        self._check(high)
        return self._tier(low, high)

    def _tier(self, low: int, high: int) -> int:
        return next(tier for tier, size in enumerate(self.sizes) if low // size == high // size)

    def level(self, source: int, destination: int) -> LevelName:
        """Name of the outermost level that a message between two ranks crosses."""
        return self.route(source, destination).level

    def route(self, source: int, destination: int) -> Route:
        """Resources in order, end-to-end latency and level of the way between two ranks.

        Raises:
            ValueError: a rank that the cluster does not have, or source equals destination.
        """
        if source == destination:
            raise ValueError(f"rank {source} has no route to itself; copy within its memory instead")
        self._check(source)
        self._check(destination)
        return self._route(source, destination)

    def _route(self, source: int, destination: int) -> Route:
        tier = self._tier(source, destination)
        top = self.levels[tier]
        if top.link == "pairs":
            return self._route_by_links(tier, source, destination)
        crossing: tuple[Resource, ...] = ()
        if top.link == "mesh":
            step = self.sizes[tier - 1] if tier else 1
            where = (source // self.sizes[tier], source // step, destination // step)
            crossing = (Resource("link", tier, where, "out", top.bytes_per_second),)
        leave, arrive = self._side(tier, source, "out"), self._side(tier, destination, "in")
        resources = leave + crossing + arrive
        if self._has_bus:  # which is passed once, be it on the way out or in
            resources = tuple(dict.fromkeys(resources))
        ends = (tier, source, destination)
        return self._finish(resources, top.latency_seconds, top.level, self._flows[tier], ends)

    def _side(self, tier: int, rank: int, direction: Literal["out", "in"]) -> tuple[Resource, ...]:
        """What a rank's traffic that crosses a level passes on its own side, in order."""
        side = self._sides.get((tier, rank, direction))
        if side is None:
            inner = [t for t in range(tier + 1) if t == tier or self.levels[t].carries_outer]
            ends = [end for t in inner for end in self._ends(t, rank, direction)]
            side = self._sides[tier, rank, direction] = tuple(ends if direction == "out" else ends[::-1])
        return side

    def _ends(self, tier: int, rank: int, direction: Literal["out", "in"]) -> list[Resource]:
        """What a rank's traffic passes at one level on its way out of, or into, the rank's side."""
        level = self.levels[tier]
        if level.link == "bus":
            return [Resource("bus", tier, (rank // self.sizes[tier],), "both", level.bytes_per_second)]
        if level.link != "switch":
            return []
        step = self.sizes[tier - 1] if tier else 1
        port = rank % step * level.ports // step
        capacity = level.bytes_per_second if direction == "out" else level.receives
        return [Resource("port", tier, (rank // step, port), direction, capacity)]

    def _route_by_links(self, tier: int, source: int, destination: int) -> Route:
        size = self.sizes[tier]
        group, first = source // size, source // size * size
        resources: list[Resource] = []
        flows: list[Curve] = []
        latency, outermost = 0.0, LEVELS[0]
        for link in self.graph(tier).path(source - first, destination - first):
            a, b = link.source + first, link.destination + first
            if self._tier(a, b) < tier:  # a hop inside: the very resources that traffic between a and b uses
                hop = self._route(a, b)
                resources += [r for r in hop.resources if r.kind != "pair"]
                flow = hop.flow
            else:
                resources.append(Resource("link", tier, (group, a, b), "out", link.bytes_per_second))
                flow = link.attained.without(link.latency_seconds) if link.attained else self._flows[tier]
            flows += [flow] if flow else []
            latency += link.latency_seconds
            outermost = max(outermost, link.level, key=LEVELS.index)
        slowest = min(flows, key=lambda curve: curve.maximum) if flows else None
        ends = (tier, source, destination)
        return self._finish(tuple(resources), latency, cast(LevelName, outermost), slowest, ends)

    def _finish(
        self,
        resources: tuple[Resource, ...],
        latency_seconds: float,
        level: LevelName,
        flow: Curve | None,
        ends: tuple[int, int, int],
    ) -> Route:
        """Adds what one pair of ranks can drive as a resource of its own where the links could carry more."""
        if flow and flow.maximum < min([r.bytes_per_second for r in resources]):
            tier, source, destination = ends
            resources += (Resource("pair", tier, (source, destination), "out", flow.maximum),)
        return Route(resources, latency_seconds, level, flow)

    def bandwidth(self, source: int, destination: int, nbytes: int) -> float:
        """Bytes/s that a single message of `nbytes` attains, latency included: what a benchmark reports."""
        return nbytes / self.route(source, destination).seconds(nbytes)

    def collective_seconds(self, kind: str, ranks: Sequence[int], nbytes: int) -> float | None:
        """Measured time (s) of a collective of `nbytes` per rank, or None where the cluster has no table."""
        if len(ranks) < 2:
            return 0.0
        curve = self.levels[self.tier(ranks)].collectives.get(kind, {}).get(len(ranks))
        return curve.seconds(nbytes) if curve else None

    def subset(self, world_size: int) -> Cluster:
        """The same cluster with the first `world_size` ranks, which are the closest together.

        Raises:
            ValueError: more ranks than the cluster has, or none.
        """
        if not 1 <= world_size <= self.world_size:
            raise ValueError(f"cluster {self.name} has {self.world_size} ranks; {world_size} were asked for")
        placement, left = [], world_size
        for name, count in self.placement:
            if left:
                placement.append((name, min(count, left)))
                left -= placement[-1][1]
        return replace(self, world_size=world_size, placement=tuple(placement))
