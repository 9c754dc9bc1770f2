import re
import time

import pytest

from counterpoint.cluster.dump import dump_cluster
from counterpoint.cluster.load import parse_cluster
from counterpoint.cluster.presets import find_cluster, preset_names, preset_path

MIB = 2**20
FIGURE = re.compile(r"[\d.]+ (?:[kMGT]i?[Bb]?|[kMGT]?(?:B|b|FLOP|OP))(?:/s)?\b|[\d.]+ (?:us|ms)\b")
ORIGIN = re.compile(r"#.*(data-sheet|measured|derived|assumed)")


def test_the_clusters_that_the_project_promises():
    assert {
        "a10x4-pcie",
        "ascend-full-mesh",
        "dgx-a100",
        "dgx-a100-pod",
        "dgx-h100",
        "dgx-h100-pod",
        "edge-lan",
        "frontier-node",
        "frontier-pod",
        "h200x8",
        "pcie-consumer",
    } <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_loads_survives_writing_and_names_its_sources(name):
    cluster = find_cluster(name)
    assert cluster.name == name
    assert cluster.about
    assert cluster.sources
    assert parse_cluster(dump_cluster(cluster)) == cluster


@pytest.mark.parametrize("name", preset_names())
def test_every_figure_of_a_preset_says_where_it_comes_from(name):
    lines = preset_path(name).read_text().splitlines()
    body = lines[next(i for i, line in enumerate(lines) if line.startswith("devices:")) :]
    figures = [line for line in body if FIGURE.search(line.split("#")[0])]
    assert len(figures) > 5
    assert [line for line in figures if not ORIGIN.search(line)] == []


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_can_cost_attention_and_reach_every_rank(name):
    cluster = find_cluster(name)
    dtype = "bfloat16" if name not in ("edge-lan", "edge-wifi") else "float32"
    for work in ("matmul", "attention_forward", "attention_backward"):
        seconds = [cluster.device(0).seconds(work, flops, 1e6, dtype) for flops in (1e8, 1e10, 1e12)]
        assert seconds == sorted(seconds)
        assert cluster.device(cluster.world_size - 1).seconds(work, 1e10, 1e6, "float32") > 0
    step = max(1, cluster.world_size // 17)
    for rank in {*range(1, min(9, cluster.world_size)), *range(step, cluster.world_size, step)}:
        times = [cluster.route(0, rank).seconds(n) for n in (1, 2**10, 2**16, MIB, 64 * MIB, 2**30)]
        assert times == sorted(times)


@pytest.mark.parametrize(("node", "pod"), [("dgx-a100", "dgx-a100-pod"), ("dgx-h100", "dgx-h100-pod")])
def test_a_pod_is_made_of_its_nodes(node, pod):
    small, large = find_cluster(node), find_cluster(pod)
    assert large.devices == small.devices
    assert large.levels[0] == small.levels[0]


def test_the_frontier_pod_is_made_of_its_nodes():
    small, large = find_cluster("frontier-node"), find_cluster("frontier-pod")
    assert large.devices == small.devices
    assert large.levels[:2] == small.levels


def test_a_thousand_devices_load_in_a_fifth_of_a_second():
    find_cluster("dgx-h100-pod")  # the first load also imports pydantic and yaml
    start = time.process_time()  # the machine may be busy with other tests
    cluster = find_cluster("dgx-h100-pod")
    routes = [cluster.route(0, rank) for rank in range(1, 1024)]
    assert time.process_time() - start < 0.2
    assert len(routes) == 1023
    assert {route.level for route in routes} == {"node", "island", "cluster"}


def test_a10_gives_the_step_times_that_tokenring_published():
    """24,000 tokens, 4 ranks, 32 heads of 128, 2 bytes: Q takes 3.5 ms, K and V 7.6 ms, Q with out 4.6 ms."""
    cluster = find_cluster("a10x4-pcie")
    q = 6000 * 32 * 128 * 2
    slowest = max(cluster.route(r, (r + 1) % 4).seconds(q) for r in range(4))
    assert slowest == pytest.approx(3.5e-3, rel=0.06)
    assert max(cluster.route(r, (r + 1) % 4).seconds(2 * q) for r in range(4)) == pytest.approx(
        7.6e-3, rel=0.06
    )
    out, there = cluster.route(0, 3), cluster.route(1, 2)  # both cross the uplink between the switches
    shared = min(r.bytes_per_second for r in set(out.resources) & set(there.resources))
    assert (q + q * (1 + 4 / 256)) / shared == pytest.approx(4.6e-3, rel=0.02)
    kernel = cluster.device(0).seconds("attention_forward", 2 * 6000**2 * 32 * 128, 4 * q, "bfloat16")
    assert kernel == pytest.approx(3.3e-3, rel=0.03)


@pytest.mark.parametrize(
    ("ranks", "mebibytes", "nanoseconds"),
    # rows of the published tables that are not points of the preset's curves
    [(2, 3, 55_215), (2, 700, 3_814_150), (4, 48, 395_650), (8, 20, 265_900), (8, 768, 6_184_700)],
)
def test_a100_all_reduce_between_the_measured_points(ranks, mebibytes, nanoseconds):
    seconds = find_cluster("dgx-a100").collective_seconds("all_reduce", range(ranks), mebibytes * MIB)
    assert seconds == pytest.approx(nanoseconds * 1e-9, rel=0.05)


def test_frontier_links_differ_and_distant_dies_share_cables():
    cluster = find_cluster("frontier-node")
    rates = [round(cluster.route(0, rank).bytes_per_second / 1e9, 1) for rank in (1, 6, 2)]
    assert rates == [162.0, 81.0, 40.5]
    assert [cluster.level(0, rank) for rank in (1, 2, 6)] == ["package", "node", "node"]
    assert set(cluster.route(0, 7).resources) & set(cluster.route(6, 7).resources)


def test_four_network_ports_serve_eight_dies():
    cluster = find_cluster("frontier-pod")
    ports = {cluster.route(rank, 8).resources[0].where for rank in range(8)}
    assert len(ports) == 4


def test_unknown_names_point_to_the_nearest_preset():
    with pytest.raises(
        ValueError, match=r"no cluster 'dgx-h10' \(did you mean 'dgx-h100'\?\): give a YAML file"
    ):
        find_cluster("dgx-h10")
    with pytest.raises(ValueError, match=r"no preset cluster 'a10x4' \(did you mean 'a10x4-pcie'\?\)"):
        preset_path("a10x4")
    with pytest.raises(ValueError, match=r"cannot read the cluster file a10x4-pcie: No such file"):
        find_cluster("./a10x4-pcie")


def test_a_copied_preset_is_found_by_its_path(tmp_path):
    copy = tmp_path / "mine"
    copy.write_text(preset_path("h200x8").read_text())
    assert find_cluster(copy) == find_cluster(str(copy)) == find_cluster("h200x8")
