"""Runs on ragged batches: killed in any way and resumed they go on exactly, on any number of processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from counterpoint.report.run import report_run
from counterpoint.schedule.timeline import Timeline
from counterpoint.training.config import TrainConfig
from counterpoint.training.metrics import read_metrics
from counterpoint.training.trainer import train
from training.runs import metrics, small_config, start

RAGGED = [
    "batching=flexsp",
    "batching.tokens=600",
    "data.sequence_length=200",
    "batching.tokens_per_rank=160",
]
pytestmark = pytest.mark.processes


def ragged(directory: Path, *overrides: str) -> TrainConfig:
    return small_config(directory, *RAGGED, "training.steps=12", "checkpoint.every=4", *overrides)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The uninterrupted run of one process, which holds every sequence whole."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("ragged") / "alone"
    config = ragged(
        directory, "parallel.data=1", "batching.tokens_per_rank=200", "training.evaluate_every=12"
    )
    assert train(config) == 0
    return directory


def wait_for(directory: Path, step: int) -> None:
    end = time.monotonic() + 120
    while len(read_metrics(directory / "metrics.jsonl")) < step:
        assert time.monotonic() < end, "the run did not start"
        time.sleep(0.02)


def test_killed_in_three_ways_and_resumed_on_other_numbers_of_processes(alone):
    """kill -9 of everything on 3 processes, SIGTERM on 2, Ctrl-C on 4, one to the end: the losses of one process."""
    directory = alone.parent / "killed"
    expected = metrics(alone)
    for processes, step, how in ((3, 5, signal.SIGKILL), (2, 6, signal.SIGTERM), (4, 8, signal.SIGINT)):
        process = start(ragged(directory, f"parallel.data={processes}", "metrics.timeline_steps=[2]"))
        wait_for(directory, step)
        process.send_signal(how)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == (-9 if how == signal.SIGKILL else 128 + how)
        assert f"planned by flexsp for {processes} processes" in out
        assert ("resuming after step" in out) == (processes != 3)
    assert train(ragged(directory, "parallel.data=1", "batching.tokens_per_rank=200")) == 0
    assert metrics(directory) == pytest.approx(expected, abs=1e-4)
    lines = [line for line in read_metrics(directory / "metrics.jsonl") if "loss" in line]
    assert [line["tokens"] for line in lines] == [
        line["tokens"] for line in read_metrics(alone / "metrics.jsonl") if "loss" in line
    ]
    assert all(line["measured_seconds"] > 0 and line["groups"] for line in lines)
    timeline = Timeline.read(directory / "timelines" / "step-00000002.json")
    assert (
        timeline.meta["plan"]["world_size"] == 3 and "Groups of step 2" in report_run(directory).read_text()
    )
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if os.fsencode(str(directory)) in _read(p)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
