"""From a validated cluster file to a Cluster; the checks of what its values mean together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from counterpoint.cluster.cluster import LEVELS, Cluster, Level, LevelName, LinkKind
from counterpoint.cluster.curves import Curve
from counterpoint.cluster.device import Device, MemoryTier
from counterpoint.cluster.graph import Link
from counterpoint.cluster.schema import ClusterFile, DeviceFile, LevelFile, LinkFile, nearest

MOST_LISTED_DEVICES = 256  # listed pairs are for hand-written groups; rules describe larger ones


class Mistake(Exception):
    """Something wrong at the keys `place` of the file."""

    def __init__(self, message: str, *place: str | int):
        super().__init__(message)
        self.place = place


def build(file: ClusterFile) -> Cluster:
    """The cluster that a file describes.

    Raises:
        Mistake: values that are each allowed but not together.
    """
    devices = {name: _device(name, d) for name, d in file.devices.items()}
    if not devices:
        raise Mistake("no device is described; give at least one", "devices")
    levels: list[Level] = []
    for index, level in enumerate(file.levels):
        levels.append(_level(index, level, file.levels, levels))
    places = 1
    for level in levels:
        places *= level.count
    world_size = file.world_size or places
    if world_size > places:
        raise Mistake(f"{world_size} ranks do not fit in the {places} places of the levels", "world_size")
    placement = _placement(file, devices, world_size)
    cluster = Cluster(
        file.name, devices, placement, tuple(levels), world_size, about=file.about, sources=dict(file.sources)
    )
    for index, level in enumerate(levels):
        if level.link == "pairs":
            _check_links(cluster, index, level)
    return cluster


def _device(name: str, file: DeviceFile) -> Device:
    if not file.memory:
        raise Mistake("no memory tier; give at least the one that kernels work in", "devices", name, "memory")
    memory = []
    for tier, m in file.memory.items():
        if m.attained and m.attained.maximum > m.bandwidth * 1.0001:
            raise Mistake(
                f"attains {m.attained.maximum:.4g} bytes/s, above its bandwidth of {m.bandwidth:.4g}",
                *("devices", name, "memory", tier, "attained"),
            )
        memory.append(MemoryTier(tier, int(m.size), m.bandwidth, m.attained or Curve.constant(m.bandwidth)))
    for work_class, table in file.rates.items():
        for dtype, curve in table.items():
            if dtype in file.peak and curve.maximum > file.peak[dtype] * 1.0001:
                raise Mistake(
                    f"attains {curve.maximum:.4g} FLOP/s, above the {dtype} peak of {file.peak[dtype]:.4g}",
                    *("devices", name, "rates", work_class, dtype),
                )
    return Device(name, file.peak, file.rates, tuple(memory), file.launch)


def _placement(
    file: ClusterFile, devices: Mapping[str, Device], world_size: int
) -> tuple[tuple[str, int], ...]:
    if file.placement is None:
        if len(devices) > 1:
            names = ", ".join(devices)
            raise Mistake(
                f"several device types ({names}) and no placement; say which ranks have which", "devices"
            )
        return ((next(iter(devices)), world_size),)
    for index, (name, _) in enumerate(file.placement):
        if name not in devices:
            known = f"{nearest(name, list(devices))}; devices are {', '.join(devices)}"
            raise Mistake(f"unknown device '{name}'{known}", "placement", index)
    total = sum(count for _, count in file.placement)
    if total != world_size:
        raise Mistake(f"places {total} devices where the cluster has {world_size} ranks", "placement")
    return file.placement


def _level(index: int, file: LevelFile, files: tuple[LevelFile, ...], inside: list[Level]) -> Level:
    place = ("levels", index)
    if inside and LEVELS.index(file.level) < LEVELS.index(inside[-1].level):
        raise Mistake(
            f"level {file.level} stands outside level {inside[-1].level}; list levels from the innermost "
            f"outwards, in the order {', '.join(LEVELS)}",
            *place,
            "level",
        )
    _check_kind(file, place)
    carries = file.carries_outer
    if carries is None:
        carries = file.link in ("switch", "bus") and LEVELS.index(file.level) >= LEVELS.index("island")
    if carries and file.link in ("mesh", "pairs"):
        raise Mistake(
            f"a {file.link} has no port that traffic of outer levels could pass", *place, "carries_outer"
        )
    bandwidth = file.bandwidth
    if file.oversubscription is not None:
        bandwidth = _tapered(file, inside, place)
    if bandwidth is None:
        bandwidth = max(link.bandwidth for link in file.links)
    _check_rates(file, bandwidth, place)
    children = 1
    for level in inside:
        children *= level.count
    if file.ports > children:
        raise Mistake(
            f"{file.ports} ports for a child of {children} devices; give {children} of more bandwidth",
            *place,
            "ports",
        )
    latency = file.latency
    if latency is None:
        latency = max(link.latency or 0.0 for link in file.links)
    level = Level(
        level=cast(LevelName, file.level),
        count=file.count,
        link=cast(LinkKind, file.link),
        bytes_per_second=bandwidth,
        latency_seconds=latency,
        name=file.name,
        peak_bytes_per_second=file.peak,
        receive_bytes_per_second=file.receive_bandwidth,
        ports=file.ports,
        attained=_checked_table(file.attained, latency, *place, "attained"),
        carries_outer=carries,
        oversubscription=file.oversubscription,
        links=_links(file, latency, children * file.count, place),
        forwarding=file.forwarding,
        collectives=file.collectives,
    )
    for kind, tables in level.collectives.items():
        for ranks in tables:
            if ranks > children * file.count:
                raise Mistake(
                    f"{ranks} ranks in a group of {children * file.count}", *place, "collectives", kind, ranks
                )
    return level


def _check_kind(file: LevelFile, place: tuple[str | int, ...]) -> None:
    """Keys that a link kind needs, and those that mean nothing to it."""
    given = file.model_fields_set
    if file.link == "pairs":
        if not file.links:
            raise Mistake("link is pairs and no links are listed; list them under links", *place)
        for key in ("bandwidth", "oversubscription", "ports", "receive_bandwidth"):
            if key in given:
                raise Mistake(f"{key} means nothing where link is pairs; every link has its own", *place, key)
        for index, link in enumerate(file.links):
            if link.latency is None and file.latency is None:
                raise Mistake("missing key 'latency'; give it here or for the level", *place, "links", index)
        return
    for key in ("links", "forwarding"):
        if key in given:
            raise Mistake(f"{key} is only for link: pairs; this level's link is {file.link}", *place, key)
    if file.link != "switch":
        for key in ("ports", "receive_bandwidth", "oversubscription"):
            if key in given:
                raise Mistake(
                    f"{key} is only for link: switch; this level's link is {file.link}", *place, key
                )
    if file.latency is None:
        raise Mistake("missing key 'latency'", *place)
    if file.bandwidth is None and file.oversubscription is None:
        raise Mistake("missing key 'bandwidth'", *place)
    if file.bandwidth is not None and file.oversubscription is not None:
        raise Mistake("give bandwidth or oversubscription, not both", *place, "oversubscription")


def _check_rates(file: LevelFile, bandwidth: float, place: tuple[str | int, ...]) -> None:
    if file.bandwidth is not None and file.peak is not None and file.bandwidth > file.peak * 1.0001:
        raise Mistake(
            f"{file.bandwidth:.4g} bytes/s is above the peak of {file.peak:.4g}", *place, "bandwidth"
        )
    tables = [(file.attained, bandwidth, place)]
    tables += [(k.attained, k.bandwidth, (*place, "links", i)) for i, k in enumerate(file.links)]
    for curve, most, here in tables:
        if curve and curve.maximum > most * 1.0001:
            message = f"attains {curve.maximum:.4g} bytes/s, above the bandwidth of {most:.4g}"
            raise Mistake(message, *here, "attained")


def _tapered(file: LevelFile, inside: list[Level], place: tuple[str | int, ...]) -> float:
    """Bytes/s of an uplink port: what the ports of the level inside send together, over the ratio."""
    assert file.oversubscription is not None
    if not inside or inside[-1].link != "switch" or not inside[-1].carries_outer:
        raise Mistake(
            "oversubscription needs a switch with carries_outer as the level inside; give bandwidth instead",
            *place,
            "oversubscription",
        )
    below = inside[-1]
    return below.count * below.ports * below.bytes_per_second / file.oversubscription / file.ports


def _links(file: LevelFile, latency: float, size: int, place: tuple[str | int, ...]) -> tuple[Link, ...]:
    if file.link == "pairs" and size > MOST_LISTED_DEVICES:
        raise Mistake(
            f"a list of pairs for {size} devices; lists go up to {MOST_LISTED_DEVICES}, use a switch or mesh",
            *place,
        )
    links: dict[tuple[int, int], Link] = {}
    for index, link in enumerate(file.links):
        a, b = link.between
        here = (*place, "links", index)
        if max(a, b) >= size:
            raise Mistake(f"device {max(a, b)} in a group of devices 0 to {size - 1}", *here, "between")
        if link.one_way and link.bandwidth_back is not None:
            raise Mistake("a one_way link has no bandwidth_back", *here, "bandwidth_back")
        for source, destination, bandwidth in _directions(link):
            if (source, destination) in links:
                raise Mistake(f"a second link from device {source} to {destination}; add their rates", *here)
            own = link.latency if link.latency is not None else latency
            curve = _checked_table(link.attained, own, *here, "attained")
            kind = cast(LevelName, link.level or file.level)
            links[source, destination] = Link(source, destination, bandwidth, own, kind, curve)
    return tuple(links.values())


def _directions(link: LinkFile) -> list[tuple[int, int, float]]:
    a, b = link.between
    there = (a, b, link.bandwidth)
    return [there] if link.one_way else [there, (b, a, link.bandwidth_back or link.bandwidth)]


def _checked_table(curve: Curve | None, latency: float, *place: str | int) -> Curve | None:
    if curve:
        try:
            curve.without(latency)
        except ValueError as error:
            raise Mistake(str(error), *place) from None
    return curve


def _check_links(cluster: Cluster, tier: int, level: Level) -> None:
    """Every device of a group reaches every other one; without forwarding, over a link of their own."""
    graph, size = cluster.graph(tier), cluster.sizes[tier]
    place = ("levels", tier, "links")
    for ranks, outwards in ((graph.reachable(0), True), (graph.reaching(0), False)):
        lost = sorted(set(range(size)) - ranks)
        if lost:
            ends = ("device 0", _named(lost)) if outwards else (_named(lost), "device 0")
            raise Mistake(
                f"the topology is not connected: no way from {ends[0]} to {ends[1]}; "
                "add a link between the two parts",
                *place,
            )
    if level.forwarding:
        return
    missing = [(a, b) for a in range(size) for b in range(size) if a != b and not graph.direct(a, b)]
    if missing:
        (a, b), more = missing[0], len(missing) - 1
        also = f" ({more} more ordered pairs have none)" if more else ""
        raise Mistake(
            f"missing link: none from device {a} to device {b}{also}; add it, or set forwarding: true "
            "if devices in between pass traffic on",
            *place,
        )


def _named(devices: list[int]) -> str:
    text = ", ".join(map(str, devices[:4])) + (", ..." if len(devices) > 4 else "")
    return f"device {text}" if len(devices) == 1 else f"devices {text}"
