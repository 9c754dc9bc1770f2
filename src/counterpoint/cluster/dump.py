"""A cluster as YAML text, which reads back as the same cluster."""

from __future__ import annotations

from typing import Any

import yaml

from counterpoint.cluster.cluster import Cluster, Level
from counterpoint.cluster.curves import Curve
from counterpoint.cluster.device import Device
from counterpoint.cluster.graph import Link


def dump_cluster(cluster: Cluster) -> str:
    """The cluster as YAML text in base units; `parse_cluster` gives the same cluster back."""
    return yaml.safe_dump(to_file(cluster), sort_keys=False, width=100)


def to_file(cluster: Cluster) -> dict[str, Any]:
    """The cluster as plain values in base units, in the order of the file format."""
    levels = [_level_to_file(level) for level in cluster.levels]
    return _without_empty(
        {
            "name": cluster.name,
            "about": cluster.about,
            "sources": dict(cluster.sources),
            "devices": {name: _device_to_file(device) for name, device in cluster.devices.items()},
            "placement": [{name: count} for name, count in cluster.placement]
            if len(cluster.devices) > 1
            else None,
            "world_size": cluster.world_size if cluster.world_size != cluster.places else None,
        }
    ) | {"levels": levels}


def _device_to_file(device: Device) -> dict[str, Any]:
    return _without_empty(
        {
            "memory": {
                m.name: {
                    "size": m.size_bytes,
                    "bandwidth": m.peak_bytes_per_second,
                    "attained": _curve_to_file(m.attained),
                }
                for m in device.memory
            },
            "peak": dict(device.peak_flops_per_second),
        }
    ) | {
        "rates": {c: {d: _curve_to_file(k) for d, k in table.items()} for c, table in device.rates.items()},
        "launch": device.launch_seconds,
    }


def _level_to_file(level: Level) -> dict[str, Any]:
    pairs = level.link == "pairs"
    derived = pairs or level.oversubscription is not None
    return _without_empty(
        {
            "level": level.level,
            "name": level.name,
            "count": level.count,
            "link": level.link,
            "peak": level.peak_bytes_per_second,
            "bandwidth": None if derived else level.bytes_per_second,
            "receive_bandwidth": level.receive_bytes_per_second,
            "oversubscription": level.oversubscription,
            "ports": level.ports if level.ports > 1 else None,
            "latency": level.latency_seconds,
            "attained": _curve_to_file(level.attained),
            "carries_outer": None if pairs or level.link == "mesh" else level.carries_outer,
            "forwarding": level.forwarding if pairs else None,
            "links": [_link_to_file(link) for link in level.links],
            "collectives": {
                kind: {ranks: _curve_to_file(curve) for ranks, curve in tables.items()}
                for kind, tables in level.collectives.items()
            },
        }
    )


def _link_to_file(link: Link) -> dict[str, Any]:
    return _without_empty(
        {
            "between": [link.source, link.destination],
            "bandwidth": link.bytes_per_second,
            "latency": link.latency_seconds,
            "attained": _curve_to_file(link.attained),
            "level": link.level,
            "one_way": True,
        }
    )


def _curve_to_file(curve: Curve | None) -> Any:
    if curve is None:
        return None
    return curve.maximum if curve.is_constant else dict(curve.points)


def _without_empty(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value not in (None, "", {}, [], ())}
