import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.cluster.dump import dump_cluster
from counterpoint.cluster.load import ClusterFileError, load_cluster, parse_cluster

SWITCH = """name: t
devices:
  gpu:
    memory:
      hbm: {size: 24 GB, bandwidth: 600 GB/s}
    peak: {bfloat16: 125 TFLOP/s}
    rates:
      matmul: {bfloat16: 90 TFLOP/s}
    launch: 4 us
levels:
  - level: node
    count: 4
    link: switch
    bandwidth: 25 GB/s
    latency: 3 us
"""
PAIRS = (
    SWITCH[: SWITCH.index("    link:")]
    + """    link: pairs
    latency: 3 us
    links:
      - {between: [0, 1], bandwidth: 25 GB/s}
      - {between: [2, 3], bandwidth: 25 GB/s}
"""
)
LAST = "    latency: 3 us\n"
JOINED = "      - {between: [1, 2], bandwidth: 25 GB/s}\n      - {between: [2, 3]"


@pytest.mark.parametrize(
    ("old", "new", "line", "keys", "message"),
    [
        ("25 GB/s", "-25 GB/s", 14, "levels[0].bandwidth", "-25 GB/s is negative; give a value above zero"),
        ("25 GB/s", "0", 14, "levels[0].bandwidth", "0 is 0; give a value above zero"),
        ("25 GB/s", ".nan", 14, "levels[0].bandwidth", "give a value above zero"),
        ("3 us", "-3 us", 15, "levels[0].latency", "-3 us is negative"),
        (
            "level: node",
            "level: rack",
            11,
            "levels[0].level",
            "unknown level 'rack'; allowed are package, node",
        ),
        (
            "link: switch",
            "link: swich",
            13,
            "levels[0].link",
            "unknown link kind 'swich' (did you mean 'switch'?)",
        ),
        ("count: 4", "count: four", 12, "levels[0].count", "'four' given where a whole number is needed"),
        ("count: 4", "count: 4.0", 12, "levels[0].count", "a number given where a whole number is needed"),
        ("count: 4", "count: 0", 12, "levels[0].count", "0 is too small; give 1 or more"),
        (
            "bandwidth: 25",
            "bandwith: 25",
            14,
            "levels[0].bandwith",
            "(did you mean 'bandwidth'?); allowed are level",
        ),
        ("levels:", "levls:", 10, "levls", "unknown key 'levls' (did you mean 'levels'?)"),
        (
            "25 GB/s",
            "25 GB",
            14,
            "levels[0].bandwidth",
            "is a size, not a bandwidth; give a bandwidth such as",
        ),
        ("25 GB/s", "fast", 14, "levels[0].bandwidth", "'fast' is not a quantity"),
        ("    launch: 4 us\n", "", 3, "devices.gpu", "missing key 'launch'"),
        (LAST, "", 11, "levels[0]", "missing key 'latency'"),
        ("    bandwidth: 25 GB/s\n", "", 11, "levels[0]", "missing key 'bandwidth'"),
        ("matmul:", "matmull:", 8, "devices.gpu.rates.matmull", "(did you mean 'matmul'?)"),
        ("bfloat16: 90", "bf16: 90", 8, "devices.gpu.rates.matmul.bf16", "(did you mean 'bfloat16'?)"),
        ("90 TFLOP/s", "{}", 8, "devices.gpu.rates.matmul.bfloat16", "the table is empty"),
        ("90 TFLOP/s", "{big: 1e12}", 8, "devices.gpu.rates.matmul.bfloat16.big", "'big' is not a quantity"),
        (
            "90 TFLOP/s",
            "130 TFLOP/s",
            8,
            "devices.gpu.rates.matmul.bfloat16",
            "above the bfloat16 peak of 1.25e+14",
        ),
        (
            "90 TFLOP/s",
            "{1e9: 1e12, 2e9: 9e13}",
            8,
            "devices.gpu.rates.matmul.bfloat16",
            "takes less time than",
        ),
        (
            "90 TFLOP/s",
            "{1e9: 1e12, 1 GFLOP: 2e12}",
            8,
            "devices.gpu.rates.matmul.bfloat16",
            "size 1000000000 twice",
        ),
        (
            "600 GB/s}",
            "600 GB/s, attained: 700 GB/s}",
            5,
            "devices.gpu.memory.hbm.attained",
            "above its bandwidth",
        ),
        ("hbm: {size: 24 GB, bandwidth: 600 GB/s}", "{}", 4, "devices.gpu.memory", "no memory tier"),
        ("name: t\n", "name: t\nname: u\n", 2, "name", "the key is given twice"),
        ("name: t", "name: 3", 1, "name", "a number given where text is needed"),
        (LAST, LAST + "    ports: 4\n", 16, "levels[0].ports", "4 ports for a child of 1 devices"),
        (LAST, LAST + "    links: []\n", 16, "levels[0].links", "links is only for link: pairs"),
        (
            LAST,
            LAST + "    peak: 20 GB/s\n",
            14,
            "levels[0].bandwidth",
            "2.5e+10 bytes/s is above the peak of 2e+10",
        ),
        (LAST, LAST + "    attained: 26 GB/s\n", 16, "levels[0].attained", "above the bandwidth of 2.5e+10"),
        (
            LAST,
            LAST + "    attained: {1e3: 2e10, 1e6: 2e10}\n",
            16,
            "levels[0].attained",
            "no longer than the latency",
        ),
        (
            LAST,
            LAST + "    oversubscription: 2\n",
            16,
            "levels[0].oversubscription",
            "bandwidth or oversubscription",
        ),
        (
            "bandwidth: 25 GB/s",
            "oversubscription: 2",
            14,
            "levels[0].oversubscription",
            "as the level inside",
        ),
        ("bandwidth: 25 GB/s", "oversubscription: 0.5", 14, "levels[0].oversubscription", "0.5 is below 1"),
        (
            LAST,
            LAST + "    carries_outer: 3\n",
            16,
            "levels[0].carries_outer",
            "where true or false is needed",
        ),
        (
            LAST,
            LAST + "    collectives: {all_reduce: {9: 1e9}}\n",
            16,
            "levels[0].collectives.all_reduce[9]",
            "9 ranks",
        ),
        (
            "levels:",
            "placement: [gpu: 3]\nlevels:",
            10,
            "placement",
            "places 3 devices where the cluster has 4 ranks",
        ),
        (
            "levels:",
            "placement: [gpux: 4]\nlevels:",
            10,
            "placement[0]",
            "unknown device 'gpux' (did you mean 'gpu'?)",
        ),
        ("levels:", "world_size: 5\nlevels:", 10, "world_size", "5 ranks do not fit in the 4 places"),
        (
            LAST,
            LAST + "  - {level: package, count: 2, link: mesh, bandwidth: 1, latency: 0}\n",
            16,
            "levels[1].level",
            "level package stands outside level node; list levels from the innermost outwards",
        ),
    ],
)
def test_a_mistake_is_one_line_with_its_place(old, new, line, keys, message):
    assert old in SWITCH
    with pytest.raises(ClusterFileError) as error:
        parse_cluster(SWITCH.replace(old, new, 1), "my.yaml")
    text = str(error.value)
    assert text.startswith(f"my.yaml:{line}: {keys}: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("old", "new", "line", "keys", "message"),
    [
        ("", "", 15, "levels[0].links", "not connected: no way from device 0 to devices 2, 3; add"),
        (
            "      - {between: [2, 3]",
            JOINED,
            15,
            "levels[0].links",
            "missing link: none from device 0 to device 2",
        ),
        ("[2, 3]", "[2, 4]", 17, "levels[0].links[1].between", "device 4 in a group of devices 0 to 3"),
        ("[2, 3]", "[2, 2]", 17, "levels[0].links[1].between", "a link from device 2 to itself"),
        ("[2, 3]", "[1, 0]", 17, "levels[0].links[1]", "a second link from device 1 to 0"),
        ("[2, 3]", "[2]", 17, "levels[0].links[1].between", "two device numbers such as [0, 1]"),
        ("[2, 3],", "[2, 3], level: rack,", 17, "levels[0].links[1].level", "unknown level 'rack'"),
        (
            "[2, 3], bandwidth: 25",
            "[2, 3], bandwidth: -25",
            17,
            "levels[0].links[1].bandwidth",
            "is negative",
        ),
        (LAST, "", 15, "levels[0].links[0]", "missing key 'latency'"),
        (LAST, LAST + "    bandwidth: 3\n", 15, "levels[0].bandwidth", "means nothing where link is pairs"),
        ("count: 4", "count: 257", 11, "levels[0]", "lists go up to 256, use a switch or mesh"),
    ],
)
def test_a_mistake_in_listed_pairs(old, new, line, keys, message):
    with pytest.raises(ClusterFileError) as error:
        parse_cluster(PAIRS.replace(old, new, 1), "my.yaml")
    assert str(error.value).startswith(f"my.yaml:{line}: {keys}: ")
    assert message in str(error.value)


def test_one_way_links_must_lead_back():
    ring = PAIRS[: PAIRS.index("    links:")] + "    forwarding: true\n    links:\n"
    hop = "      - {{between: [{}, {}], bandwidth: 1e9, one_way: true}}\n".format
    with pytest.raises(ClusterFileError, match="not connected: no way from devices 1, 2, 3 to device 0"):
        parse_cluster(ring + hop(0, 1) + hop(1, 2) + hop(2, 3))
    closed = parse_cluster(ring + hop(0, 1) + hop(1, 2) + hop(2, 3) + hop(3, 0))
    assert [len(closed.route(0, b).resources) for b in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "c.yaml:1: the file is empty"),
        ("# only this\n", "c.yaml:1: the file is empty"),
        ("- 1", "c.yaml:1: a list stands where a mapping"),
        ("name: [t\nlevels: 3", "c.yaml:2: not valid YAML"),
        ("a: &x {b: *x}", "c.yaml:1: the file refers to itself"),
        ("? [1, 2]\n: 3", "a key must be text or a number"),
        ("a: 1\n---\nb: 2", "c.yaml:2: not valid YAML"),
        ("a: !!python/object:os.system {}", "c.yaml:1:"),
        ("a: \x00", "not valid YAML"),
        ("name: a\nabout: 2026-13-45", "c.yaml:2: about: cannot read '2026-13-45'; put text in quotes"),
        ("name: !!int x", "c.yaml:1: name: cannot read 'x'"),
        ("name: 2026-10-01\ndevices: {}\nlevels: []", "c.yaml:1: name: date given where text is needed"),
    ],
)
def test_what_is_no_cluster_file_at_all(text, message):
    with pytest.raises(ClusterFileError) as error:
        parse_cluster(text, "c.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(ClusterFileError, match=r"cannot read the cluster file .*none\.yaml: No such file"):
        load_cluster(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ClusterFileError, match="it is not UTF-8 text"):
        load_cluster(tmp_path / "binary.yaml")


def test_merged_keys_may_be_replaced():
    text = SWITCH.replace("  gpu:", "  gpu: &gpu", 1).replace(
        "levels:", "  big: {<<: *gpu, launch: 1 us}\nplacement: [gpu: 2, big: 2]\nlevels:"
    )
    cluster = parse_cluster(text)
    assert [cluster.device(rank).launch_seconds for rank in range(4)] == [4e-6, 4e-6, 1e-6, 1e-6]


rates = st.floats(1e3, 1e12).map(float)
tables = st.one_of(
    rates, st.sets(st.integers(1, 2**30), min_size=2, max_size=4).map(lambda s: {n: 1e3 * n**0.5 for n in s})
)


@st.composite
def cluster_files(draw):
    """Files over every link kind, as plain values."""
    levels = []
    order = ["package", "node", "island", "cluster"]
    for name in sorted(draw(st.lists(st.sampled_from(order), max_size=3)), key=order.index):
        kind = draw(st.sampled_from(["switch", "mesh", "bus", "pairs"]))
        level = {
            "level": name,
            "count": draw(st.integers(1, 4)),
            "link": kind,
            "latency": draw(st.floats(0, 1e-9)),
        }
        if kind == "pairs":
            size = level["count"]
            for inner in levels:
                size *= inner["count"]
            if size < 2:
                continue
            level["links"] = [{"between": [i, i + 1], "bandwidth": draw(rates)} for i in range(size - 1)]
            level["forwarding"] = True
        else:
            level["bandwidth"] = 1e12
            level["attained"] = draw(tables)
        if kind in ("switch", "bus"):
            level["carries_outer"] = draw(st.booleans())
        levels.append(level)
    rate = draw(st.one_of(rates, st.just({"1 GFLOP": 1e9, "1 TFLOP": 1e12})))
    device = {
        "memory": {"hbm": {"size": draw(st.integers(1, 2**40)), "bandwidth": 1e12, "attained": draw(tables)}},
        "rates": {"matmul": {"bfloat16": rate}},
        "launch": draw(st.floats(0, 1)),
    }
    return {"name": draw(st.text(min_size=1, max_size=9)), "devices": {"gpu": device}, "levels": levels}


@settings(max_examples=60, deadline=None)
@given(cluster_files())
def test_a_cluster_written_and_read_is_the_same_cluster(data):
    import yaml

    cluster = parse_cluster(yaml.safe_dump(data))
    text = dump_cluster(cluster)
    again = parse_cluster(text)
    assert again == cluster
    assert dump_cluster(again) == text
    for rank in range(1, cluster.world_size):
        assert again.route(0, rank) == cluster.route(0, rank)


def test_a_subset_and_a_mixed_cluster_survive_writing():
    text = SWITCH.replace("levels:", "  cpu: *gpu\nplacement: [gpu: 1, cpu: 3]\nlevels:").replace(
        "gpu:", "gpu: &gpu", 1
    )
    cluster = parse_cluster(text)
    assert parse_cluster(dump_cluster(cluster)) == cluster
    part = cluster.subset(2)
    assert parse_cluster(dump_cluster(part)).route(0, 1) == cluster.route(0, 1)
    assert parse_cluster(dump_cluster(part)).world_size == 2
