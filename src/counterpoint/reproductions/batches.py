"""Set-ups that the reproductions of batch planners share: a model of 7 billion parameters, clusters, drawn batches."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from counterpoint.cluster.cluster import Cluster, Level
from counterpoint.cluster.curves import Curve
from counterpoint.cluster.presets import find_cluster
from counterpoint.model.config import ModelConfig
from counterpoint.planner.batch_cost import BatchCost
from counterpoint.planner.lengths import find_distribution


def seven_billion(heads: int, kv_heads: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=4096 // heads,
    )  # fmt: skip


def with_ports(cluster: Cluster, bytes_per_second: float, memory_bytes: int) -> Cluster:
    """The cluster with ports of this rate out of a node for every device, and with devices of this memory."""
    levels = []
    for level in cluster.levels:
        if level.level == "node":
            levels.append(level)
            continue
        scaled = _scaled(level, bytes_per_second / level.bytes_per_second)
        levels.append(replace(scaled, receive_bytes_per_second=None))
    devices = {
        name: replace(d, memory=(replace(d.memory[0], size_bytes=memory_bytes), *d.memory[1:]))
        for name, d in cluster.devices.items()
    }
    return replace(cluster, levels=tuple(levels), devices=devices)


@lru_cache(maxsize=4)
def flexsp_cost(gigabytes_per_second: float = 12.5) -> BatchCost:
    """64 A100 of 40 GB on 8 nodes, Ulysses, ZeRO-3; 64 heads, so that 64 ranks can share a sequence."""
    place = find_cluster("dgx-a100-pod").subset(64)
    return BatchCost(seven_billion(64, 64), with_ports(place, gigabytes_per_second * 1e9, 40 * 10**9), 64)


@lru_cache(maxsize=4)
def bytescale_cost(network: float = 1.0) -> BatchCost:
    """1,024 H100, 8K tokens a rank, ring attention with 8 key/value heads, ZeRO-1; network: rates of the preset's
    ports, all scaled by this."""
    place = find_cluster("dgx-h100-pod")
    levels = tuple(level if level.level == "node" else _scaled(level, network) for level in place.levels)
    place = replace(place, levels=levels)
    return BatchCost(seven_billion(32, 8), place, 1024, "ring", "zero1", tokens_per_rank=8192)


def _scaled(level: Level, factor: float) -> Level:
    """A level with all its rates times `factor`."""
    received = level.receive_bytes_per_second
    return replace(
        level,
        bytes_per_second=factor * level.bytes_per_second,
        attained=level.attained and Curve.of((size, factor * rate) for size, rate in level.attained.points),
        receive_bytes_per_second=received and factor * received,
    )


@lru_cache(maxsize=16)
def drawn(name: str, count: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(find_distribution(name).draw(count, longest, seed))


@lru_cache(maxsize=16)
def of_tokens(name: str, tokens: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """A batch of about this many tokens."""
    found, total = [], 0
    for length in drawn(name, 65536, longest, seed):
        if total >= tokens:
            break
        found.append(length)
        total += length
    return tuple(found)
