"""This machine, really measured: little of it, so that it takes seconds."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from counterpoint.calibration.calibrate import calibrate
from counterpoint.calibration.check import MARGIN, Comparison, compare, kernels, messages
from counterpoint.calibration.machine import this_machine
from counterpoint.calibration.measurement import Calibration, Point
from counterpoint.calibration.text import cluster_text
from counterpoint.calibration.timing import Effort
from counterpoint.cluster.cluster import Cluster

EFFORT = Effort(0.05, 4, 3)
SLACK = 4.0  # other tests and programs run at the same time

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def measured() -> tuple[Calibration, Cluster]:
    machine = dataclasses.replace(this_machine(), cache_bytes=2**20)
    found = calibrate(machine, 2, EFFORT, os.environ)
    return found, cluster_text(found)[1]


def test_every_quantity_is_there_and_positive(measured):
    found, cluster = measured
    device = cluster.device(0)
    assert set(device.rates) == {"matmul", "attention_forward", "attention_backward", "elementwise"}
    assert 1e-8 < device.launch_seconds < 1e-3
    (level,) = cluster.levels
    assert level.count == 2 and 1e-6 < level.latency_seconds < 0.1
    assert set(level.collectives) == {"all_gather", "all_to_all", "reduce_scatter", "all_reduce", "broadcast"}
    threads = {int(name.rsplit("/")[-1]) for name in found.points("stream/")}
    assert {1, found.machine.cores} <= threads
    assert 0 < found.undisturbed <= 1


def test_rates_are_those_of_a_processor(measured):
    _, cluster = measured
    device = cluster.device(0)
    # a core does a few operations a cycle at the least, and fewer than any chip at the most
    assert 1e9 < device.rates["matmul"]["float32"].maximum < 1e12
    # memory that a cache holds is at least as quick as memory that none holds
    curve = device.memory[0].attained
    assert curve.at(2**18) > 0.5 * curve.points[-1][1]


def test_predictions_agree_with_a_fresh_measurement(measured):
    _, cluster = measured
    rows = compare(cluster, EFFORT, os.environ)
    assert [row.name for row in rows] == ["matmul", *kernels(), *messages(2)]
    for row in rows:
        low, high = row.measured.best / SLACK, row.measured.seconds[-1] * SLACK
        assert low <= row.predicted <= high, f"{row.name}: {row.predicted} not within {low} - {high}"


def test_a_prediction_holds_within_the_range_of_the_runs_and_a_margin():
    runs = Point.of(1, "x", [1.0, 1.2, 2.0])
    assert all(Comparison("x", t, runs).holds for t in (1.01 / MARGIN, 1.0, 1.5, 1.99 * MARGIN))
    assert not any(Comparison("x", t, runs).holds for t in (0.99 / MARGIN, 2.01 * MARGIN))


def test_a_machine_without_room_for_stream_is_told():
    machine = dataclasses.replace(this_machine(), cache_bytes=2**30, memory_bytes=8 * 2**30)
    with pytest.raises(ValueError, match=r"three arrays of 4096 MiB.*use a machine with more"):
        calibrate(machine, 2, EFFORT, os.environ)


@pytest.mark.gpu
@pytest.mark.skipif(not this_machine().accelerators, reason="no GPU on this machine")
def test_gpus_are_measured_and_described(measured):
    from counterpoint.calibration.gpu import measure_gpus

    found, _ = measured
    series = dict(found.series) | measure_gpus(EFFORT)
    count = len(found.machine.accelerators)
    _, cluster = cluster_text(dataclasses.replace(found, gpus=True, ranks=count, series=series))
    gpu = cluster.device(0)
    assert gpu.name == "gpu" and gpu.rates["matmul"]["bfloat16"].maximum > 1e12
    assert gpu.memory[0].attained.maximum > gpu.tier("host").attained.maximum


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler on this machine")
def test_the_benchmark_compiles_runs_and_compares(tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "stream.py"
    arguments = ["--threads", "1", "--rounds", "1", "--repeats", "2", "--array-bytes", str(2**20)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert "triad: torch reaches" in done.stdout, done.stderr


def test_without_a_compiler_the_benchmark_says_so():
    script = Path(__file__).parents[2] / "benchmarks" / "stream.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (
        0,
        "skipped: no C compiler (cc, gcc or clang) on this machine\n",
    )
