import pickle
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.cluster.load import parse_cluster
from counterpoint.cluster.presets import find_cluster

DEVICES = """
devices:
  gpu:
    memory: {hbm: {size: 24 GB, bandwidth: 600 GB/s}}
    rates: {matmul: {bfloat16: 90 TFLOP/s}}
    launch: 4 us
"""


def cluster_of(levels: str):
    return parse_cluster(f"name: test{DEVICES}levels:\n{levels}")


POD = cluster_of("""
  - {level: node, count: 8, link: switch, bandwidth: 400 GB/s, latency: 2 us}
  - {level: island, count: 4, link: switch, ports: 4, bandwidth: 50 GB/s, latency: 5 us}
  - {level: cluster, count: 8, link: switch, oversubscription: 2, latency: 7 us}
""")
BOX = cluster_of("""
  - {level: package, count: 2, link: mesh, bandwidth: 160 GB/s, latency: 1 us}
  - level: node
    count: 2
    link: pairs
    forwarding: true
    latency: 2 us
    links:
      - {between: [0, 2], bandwidth: 40 GB/s}
      - {between: [1, 3], bandwidth: 80 GB/s}
  - {level: cluster, count: 3, link: bus, bandwidth: 1 GB/s, latency: 1 ms}
""")
TREE = cluster_of("""
  - level: node
    count: 2
    link: switch
    bandwidth: 21 GB/s
    attained: 14 GB/s
    latency: 1 us
    carries_outer: true
  - {level: node, count: 3, link: mesh, bandwidth: 20 GB/s, attained: 13 GB/s, latency: 2 us}
""")
CLUSTERS = [POD, BOX, TREE]


def mirrored(resource):
    where = resource.where
    if resource.kind == "link":
        where = (where[0], where[2], where[1])
    elif resource.kind == "pair":
        where = where[::-1]
    turned = (
        {"out": "in", "in": "out"}.get(resource.direction) if resource.kind == "port" else resource.direction
    )
    return resource.kind, resource.tier, where, turned, resource.bytes_per_second


def plain(resource):
    return resource.kind, resource.tier, resource.where, resource.direction, resource.bytes_per_second


@st.composite
def pairs(draw):
    cluster = draw(st.sampled_from(CLUSTERS))
    source = draw(st.integers(0, cluster.world_size - 1))
    destination = draw(st.integers(0, cluster.world_size - 1).filter(lambda rank: rank != source))
    return cluster, source, destination


@given(pairs())
def test_the_way_back_uses_the_other_direction_of_the_same_resources(pair):
    cluster, source, destination = pair
    there, back = cluster.route(source, destination), cluster.route(destination, source)
    assert {plain(r) for r in there.resources} == {mirrored(r) for r in back.resources}
    assert there.latency_seconds == back.latency_seconds
    assert there.level == back.level == cluster.level(source, destination)


@given(pairs(), st.integers(1, 2**30))
def test_a_lone_message_attains_no_more_than_any_resource_on_its_way(pair, nbytes):
    cluster, source, destination = pair
    route = cluster.route(source, destination)
    attained = cluster.bandwidth(source, destination, nbytes)
    assert 0 < attained <= min(r.bytes_per_second for r in route.resources)
    assert nbytes / attained == pytest.approx(
        route.latency_seconds + nbytes / route.flow_bytes_per_second(nbytes)
    )


@given(pairs())
def test_every_route_has_resources_once_each_and_a_latency(pair):
    cluster, source, destination = pair
    route = cluster.route(source, destination)
    assert len(set(route.resources)) == len(route.resources) > 0
    assert route.latency_seconds > 0


@given(st.sampled_from(CLUSTERS), st.data())
def test_a_subset_keeps_routes_and_devices_of_the_first_ranks(cluster, data):
    size = data.draw(st.integers(2, cluster.world_size))
    part = cluster.subset(size)
    a, b = data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=2, unique=True))
    assert part.world_size == size
    assert part.route(a, b) == cluster.route(a, b)
    assert part.device(a) == cluster.device(a)
    with pytest.raises(ValueError, match=f"ranks 0 to {size - 1}; rank {size} was asked for"):
        part.route(0, size)


def test_subset_packs_ranks_into_the_fewest_groups():
    assert {POD.subset(8).level(0, b) for b in range(1, 8)} == {"node"}
    assert POD.subset(32).level(0, 31) == "island"
    assert POD.subset(33).level(0, 32) == "cluster"


def test_levels_by_common_group():
    assert [POD.level(0, b) for b in (7, 8, 31, 32, 255)] == [
        "node",
        "island",
        "island",
        "cluster",
        "cluster",
    ]


def test_devices_of_a_child_share_its_ports_in_blocks():
    nics = [POD.route(rank, 8).resources[0].where for rank in range(8)]
    assert nics == [(0, 0), (0, 0), (0, 1), (0, 1), (0, 2), (0, 2), (0, 3), (0, 3)]


def test_outer_traffic_passes_inner_ports_only_where_they_carry_it():
    kinds = [(r.kind, r.tier, r.direction) for r in POD.route(0, 255).resources]
    assert kinds == [("port", 1, "out"), ("port", 2, "out"), ("port", 2, "in"), ("port", 1, "in")]
    kinds = [(r.kind, r.tier) for r in TREE.route(0, 5).resources]
    assert kinds == [("port", 0), ("link", 1), ("port", 0), ("pair", 1)]


def test_an_oversubscribed_uplink_carries_the_ports_below_over_the_ratio():
    uplink = POD.route(0, 255).resources[1]
    assert uplink.bytes_per_second == 4 * 4 * 50e9 / 2


def test_flows_of_different_ranks_meet_on_the_trunk_of_a_mesh():
    first, second = TREE.route(0, 2).resources, TREE.route(1, 3).resources
    assert [r.kind for r in set(first) & set(second)] == ["link"]
    assert not set(TREE.route(2, 0).resources) & set(first)


def test_what_one_pair_can_drive_bounds_all_its_flows():
    pair = TREE.route(0, 1).resources[-1]
    assert (pair.kind, pair.where, pair.bytes_per_second) == ("pair", (0, 1), 14e9)


def test_listed_pairs_forward_over_the_fewest_hops_then_the_widest():
    route = BOX.route(0, 3)  # 0-1-3 and 0-2-3 both have two hops; 1-3 is wider than 0-2
    assert [r.bytes_per_second for r in route.resources] == [160e9, 80e9]
    assert route.latency_seconds == pytest.approx(3e-6)
    assert route.level == "node"


def test_a_hop_inside_a_package_is_the_same_resource_as_traffic_within_it():
    inside = BOX.route(4, 5).resources[0]
    assert inside in BOX.route(4, 7).resources


def test_a_bus_is_one_resource_for_both_directions():
    assert BOX.route(0, 4).resources == BOX.route(9, 2).resources
    assert BOX.route(0, 4).resources[0].direction == "both"


def test_directions_may_differ():
    cluster = cluster_of(
        "  - {level: cluster, count: 2, link: switch, latency: 1 ms, bandwidth: 5 MB/s, "
        "receive_bandwidth: 50 MB/s}"
    )
    assert [r.bytes_per_second for r in cluster.route(0, 1).resources] == [5e6, 50e6]
    cluster = cluster_of("""
  - level: cluster
    count: 2
    link: pairs
    links: [{between: [0, 1], bandwidth: 5 MB/s, bandwidth_back: 50 MB/s, latency: 1 ms}]
""")
    assert cluster.route(0, 1).bytes_per_second == 5e6
    assert cluster.route(1, 0).bytes_per_second == 50e6


def test_a_listed_link_may_belong_to_an_outer_level():
    cluster = cluster_of("""
  - level: node
    count: 3
    link: pairs
    forwarding: true
    latency: 1 us
    links:
      - {between: [0, 1], bandwidth: 25 GB/s}
      - {between: [1, 2], bandwidth: 1 GB/s, latency: 50 us, level: cluster}
""")
    assert (cluster.level(0, 1), cluster.level(0, 2)) == ("node", "cluster")
    assert cluster.route(0, 2).latency_seconds == pytest.approx(51e-6)


def test_measured_collectives_are_used_for_their_number_of_ranks_only():
    cluster = cluster_of("""
  - level: node
    count: 4
    link: switch
    bandwidth: 100 GB/s
    latency: 2 us
    collectives: {all_reduce: {2: {1 MiB: 20 GB/s, 1 GiB: 90 GB/s}}}
""")
    assert cluster.collective_seconds("all_reduce", [0, 3], 2**20) == pytest.approx(2**20 / 20e9)
    assert cluster.collective_seconds("all_reduce", [0, 1, 2], 2**20) is None
    assert cluster.collective_seconds("all_gather", [0, 1], 2**20) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: POD.route(3, 3), "rank 3 has no route to itself"),
        (lambda: POD.route(0, 256), "has ranks 0 to 255; rank 256 was asked for"),
        (lambda: POD.device(-1), "rank -1 was asked for"),
        (lambda: POD.subset(257), "has 256 ranks; 257 were asked for"),
        (lambda: POD.subset(0), "0 were asked for"),
    ],
)
def test_asking_for_what_is_not_there(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@settings(max_examples=20)
@given(st.integers(1, 64), st.integers(1, 64))
def test_places_are_the_product_of_counts(a, b):
    cluster = cluster_of(
        f"  - {{level: node, count: {a}, link: switch, bandwidth: 1e9, latency: 0}}\n"
        f"  - {{level: cluster, count: {b}, link: switch, bandwidth: 1e9, latency: 0}}"
    )
    assert cluster.places == cluster.world_size == a * b


def test_many_thousand_devices_cost_no_more_than_their_description():
    levels = (
        "  - {level: node, count: 8, link: switch, bandwidth: 400 GB/s, latency: 2 us}\n"
        "  - {level: cluster, count: 8192, link: switch, ports: 8, bandwidth: 50 GB/s, latency: 5 us}"
    )
    start = time.process_time()
    cluster = cluster_of(levels)
    assert cluster.route(0, 65_535).bytes_per_second == 50e9
    assert cluster.route(65_535, 65_528).level == "node"
    assert time.process_time() - start < 0.2


def test_what_has_been_found_about_a_cluster_does_not_travel_with_it():
    pod = find_cluster("dgx-h100-pod")
    route, numbers = pod.ways.between(0, 9)
    assert route == pod.route(0, 9) and len(numbers) == len(route.resources)
    assert [pod.ways.capacities[n] for n in numbers] == [r.bytes_per_second for r in route.resources]
    shared = set(numbers) & set(pod.ways.between(0, 17)[1])
    assert shared == {n for n, r in zip(numbers, route.resources) if r in pod.route(0, 17).resources}
    copied = pickle.loads(pickle.dumps(pod))
    assert copied == pod and "ways" not in vars(copied)
