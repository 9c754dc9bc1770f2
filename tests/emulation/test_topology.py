"""Wires: flows share in the scale model what they share in the cluster, and packets find their way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.cluster.cluster import Resource
from counterpoint.cluster.load import parse_cluster
from counterpoint.cluster.presets import find_cluster, preset_names
from counterpoint.emulation.topology import Topology, build_topology, forwarding

# an odd cluster: two hosts of two devices behind one NIC each, devices joined by a bus inside
ODD = """
name: odd
devices:
  cpu:
    memory: {ram: {size: 1 GB, bandwidth: 1 GB/s}}
    rates: {matmul: {float32: 1 GFLOP/s}}
    launch: 1 us
levels:
  - {level: node, count: 2, link: bus, bandwidth: 3 GB/s, latency: 1 us}
  - {level: island, count: 3, link: switch, bandwidth: 1 GB/s, receive_bandwidth: 2 GB/s, latency: 5 us}
"""


def cluster_of(name: str, ranks: int):
    cluster = parse_cluster(ODD) if name == "odd" else find_cluster(name)
    return cluster.subset(min(ranks, cluster.world_size))


def pairs(ranks: int):
    return [(a, b) for a in range(ranks) for b in range(ranks) if a != b]


@given(st.sampled_from([*preset_names(), "odd"]), st.integers(2, 12))
def test_every_way_passes_the_resources_of_its_route_and_nothing_else(name, ranks):
    cluster = cluster_of(name, ranks)
    topology = build_topology(cluster, {})
    for a, b in pairs(cluster.world_size):
        way = [topology.wires[i] for i in topology.ways[a, b]]
        passed = [wire.resource for wire in way if wire.resource is not None]
        assert passed == [r for r in cluster.route(a, b).resources if r.kind != "pair"]
        assert [way[0].source, *(w.target for w in way)] == [*(w.source for w in way), b]
        assert way[0].source == a


@given(st.sampled_from([*preset_names(), "odd"]), st.integers(2, 12))
def test_a_wire_carries_the_flows_of_its_resource_with_their_own_limits(name, ranks):
    cluster = cluster_of(name, ranks)
    topology = build_topology(cluster, {(0, 1): 1.0})
    seen: set[Resource] = set()
    for index, wire in enumerate(topology.wires):
        users = {pair for pair, way in topology.ways.items() if index in way}
        assert {(f.source, f.destination) for f in wire.flows} == users
        for f in wire.flows:
            limit = 1.0 if (f.source, f.destination) == (0, 1) else float("inf")
            most = cluster.route(f.source, f.destination).bytes_per_second
            assert f.bytes_per_second == min(wire.bytes_per_second, most, limit)
        if wire.resource is not None:
            assert wire.resource not in seen, "two wires for one resource would let it carry twice as much"
            assert wire.bytes_per_second == wire.resource.bytes_per_second
            seen.add(wire.resource)


@given(st.sampled_from([*preset_names(), "odd"]), st.integers(2, 12))
def test_the_fabric_forwards_every_packet_along_its_way(name, ranks):
    topology = build_topology(cluster_of(name, ranks), {})
    tables = {i: forwarding(topology, i) for i, w in enumerate(topology.wires) if w.target == topology.fabric}
    for pair, way in topology.ways.items():
        at = way[0]
        walked = [at]
        while topology.wires[at].target == topology.fabric:
            usual, exceptions = tables[at]
            at = exceptions.get(pair, usual[pair[1]])
            walked.append(at)
        assert tuple(walked) == way


def test_a_mesh_is_one_direct_wire_per_ordered_pair():
    topology = build_topology(cluster_of("ascend-full-mesh", 4), {})
    assert {(w.source, w.target) for w in topology.wires} == set(pairs(4))


def test_a_port_starts_at_its_rank_so_that_the_rank_feels_it():
    topology: Topology = build_topology(cluster_of("dgx-a100", 3), {})
    leaving = [w for w in topology.wires if w.resource and w.resource.direction == "out"]
    assert [(w.source, w.target) for w in leaving] == [(rank, topology.fabric) for rank in range(3)]
    assert all(len(w.flows) == 2 for w in leaving)


@pytest.mark.parametrize("shared", [(0, 2), (1, 2), (0, 4)])
def test_traffic_of_one_host_meets_at_its_nic(shared):
    a, b = shared
    topology = build_topology(cluster_of("odd", 6), {})
    nic = next(
        w for w in topology.wires if w.resource and w.resource.tier == 1 and w.resource.where[0] == 0
        and w.resource.direction == "out"
    )  # fmt: skip
    assert (a, b) in {(f.source, f.destination) for f in nic.flows}
    assert nic.source == nic.target == topology.fabric
