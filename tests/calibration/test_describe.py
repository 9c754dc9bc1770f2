"""A calibrated cluster predicts the times that it was made from, and its file reads back as it was."""

import pytest
import yaml

from calibration.made import FLOPS, FLOW, LATENCY, LAUNCH, MEMORY, RUNS, TOGETHER, calibration
from counterpoint.calibration.check import kernels, messages, predict, specs
from counterpoint.calibration.describe import describe
from counterpoint.calibration.text import cluster_text
from counterpoint.kernels.attention import Merge

CLOSE = 1e-3


@pytest.mark.parametrize("kind", ["matmul", "attention_forward", "attention_backward", "elementwise"])
def test_kernels_take_the_measured_time(kind):
    cluster, _ = describe(calibration())
    for name in ("core", "all-cores"):
        for point in calibration().series[f"{name}/{kind}"].points:
            took = cluster.devices[name].seconds(kind, point.size, 0, "float32")
            assert took == pytest.approx(point.quiet, rel=CLOSE)
            assert took == pytest.approx(LAUNCH + point.size / FLOPS, rel=CLOSE)


def test_memory_and_messages_take_the_measured_time():
    cluster, _ = describe(calibration())
    assert cluster.device(1).seconds("elementwise", 0, 2**26, "float32") == pytest.approx(
        LAUNCH + 2**26 / MEMORY, rel=CLOSE
    )
    for nbytes in (2**15, 2**20, 2**25):
        for way in ((0, 1), (1, 0)):
            took = cluster.route(*way).seconds(nbytes)
            assert took == pytest.approx(LATENCY + nbytes / FLOW, rel=0.02)
    assert cluster.levels[0].bytes_per_second == pytest.approx(TOGETHER, rel=CLOSE)
    assert cluster.collective_seconds("all_gather", (0, 1), 2**25) == pytest.approx(
        LATENCY + 2**25 / FLOW, rel=CLOSE
    )


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_the_simulator_agrees_with_the_costs(ranks):
    found = predict(describe(calibration(ranks))[0])
    for name, kernel in kernels().items():
        work = kernel.work(*specs(kernel))
        turns = max(1.0, ranks / 2)  # on the two cores of the machine
        expected = turns * (LAUNCH + max(work.flops / FLOPS, work.nbytes / MEMORY))
        assert found[name] == pytest.approx(expected, rel=CLOSE), name
    assert isinstance(kernels()["merge"], Merge)
    assert len(found) == 1 + len(kernels()) + len(messages(ranks))
    if ranks > 1:
        size, rounds = 3 * 2**20, 4
        there = found["message of 3 MiB, there and back 4 times"]
        assert there == pytest.approx(2 * rounds * (LATENCY + size / FLOW), rel=0.02)
        ring = found["3 MiB to the next rank, 4 times"]
        assert ring == pytest.approx(rounds * (LATENCY + ranks * size / TOGETHER), rel=0.02)


def test_a_device_used_alone_needs_no_links():
    cluster, _ = describe(calibration(1))
    assert cluster.world_size == 1 and not cluster.levels


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_file_reads_back_and_every_figure_has_its_spread(ranks):
    made = calibration(ranks)
    text, read = cluster_text(made)
    described, comments = describe(made)
    assert read.placement == described.placement and set(read.devices) == set(described.devices)
    for name, series in made.points("core/").items():
        if series.unit == "flops":
            expected = described.devices["core"].rates[name]["float32"]
            for point in series.points:
                assert read.devices["core"].rates[name]["float32"].at(point.size) == pytest.approx(
                    expected.at(point.size), rel=1e-5
                )
    assert made.date in read.sources["measured"] and made.date in text.splitlines()[0]
    assert "triad 10 GB/s" in read.sources["stream-1"]
    spread = f"{len(RUNS)} runs, +0 +0 +50 %"
    figures = [
        line
        for line in text.splitlines()
        if line.split(":")[0].strip().isdigit() or line.strip().startswith(("launch:", "latency:"))
    ]
    figures = [line for line in figures if not line.endswith(":")]  # a number of ranks heads a table
    assert len(figures) > 30 and all("# " in line and " runs, " in line for line in figures)
    assert any(spread in line or "+10" in line for line in figures)
    assert len(comments) >= len(figures)


def test_comments_do_not_change_the_file():
    text, _ = cluster_text(calibration())
    without = "\n".join(line.split("  # ")[0] for line in text.splitlines())
    assert yaml.safe_load(text) == yaml.safe_load(without)


def test_noise_in_small_messages_cannot_make_an_unreadable_file():
    made = calibration()
    noisy = dict(made.series)
    for way in ("0-1", "1-0"):  # the smallest message was quicker than an empty one
        points = noisy[f"link/{way}"].points
        fast = points[0].of(points[0].size, "lucky", [LATENCY / 3])
        noisy[f"link/{way}"] = type(noisy[f"link/{way}"])("bytes", (fast, *points[1:]))
    made = type(made)(made.machine, made.date, 2, False, True, 1.0, noisy)
    _, cluster = cluster_text(made)
    assert cluster.route(0, 1).seconds(2**10) == pytest.approx(LATENCY, rel=0.05)
