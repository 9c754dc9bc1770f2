"""`counterpoint bench attention`: what is counted, how kernels are compared, and what a user sees."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from counterpoint.calibration.attention import MaskKind, compare, file_name, flops, trials
from counterpoint.cli.bench import On, attention
from counterpoint.kernels.backends import CPU_FLASH, PLAIN, Problem, find

PROBLEM = Problem("cpu", torch.float32, 4, 2, 32, "causal", 1, 2, 256)


def bench(*options: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "counterpoint", "bench", "attention", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


def test_flops_are_those_of_flash_attention() -> None:
    square = 4 * 256**2 * 32 * 4 * 2  # batch 2, 4 heads
    assert flops(PROBLEM, MaskKind(False), "forward") == square
    assert flops(PROBLEM, MaskKind(), "forward") == square / 2
    assert flops(PROBLEM, MaskKind(), "backward") == 2.5 * square / 2
    one_key = flops(PROBLEM, MaskKind(window=1), "forward")
    assert one_key == square / 256
    assert flops(PROBLEM, MaskKind(False, documents=4), "forward") == square / 4


def test_kernels_are_compared_and_those_that_cannot_say_why() -> None:
    def wrong(q, k, v, areas, scale):
        return CPU_FLASH.forward(q, k, v, areas, scale * 1.1)

    backends = [CPU_FLASH, PLAIN, find("flash"), replace(CPU_FLASH, name="wrong", forward=wrong)]
    found = compare(PROBLEM, [64, 100], ["forward"], backends, mask=MaskKind(), seconds=0.01)
    assert [(t.tokens, t.backend) for t in found.timed] == [
        (n, b) for n in (64, 100) for b in ("cpu-flash", "plain")
    ]
    for tokens in (64, 100):
        here = [t for t in found.timed if t.tokens == tokens]
        assert all(0 < t.of_best <= 1 and len(t.seconds) >= 3 for t in here)
        assert max(t.of_best for t in here) > 0.5
    assert {(x.backend, x.why.split(":")[0]) for x in found.left_out} == {
        ("flash", "runs on cuda"),
        ("wrong", "wrong"),
    }
    assert [t.backend for t in trials(found, 64, "forward")] == ["cpu-flash", "plain", "flash", "wrong"]
    assert found.peak[0] > 1e8 and found.peak[1] >= 512


def test_names_of_files() -> None:
    assert file_name("NVIDIA H200 (141 GB), 8x") == "nvidia-h200-141-gb-8x"


def test_the_command_prints_json_and_records_it(tmp_path: Path) -> None:
    options = (
        "-t",
        "64",
        "-t",
        "90",
        "--heads",
        "2",
        "--kv-heads",
        "1",
        "--head-dim",
        "16",
        "--backward",
        "--window",
        "20",
    )
    done = bench(*options, "--device", "cpu", "--quick", "--json", "--record", str(tmp_path))
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    (kept,) = tmp_path.iterdir()
    assert json.loads(kept.read_text()) == shown and kept.name.startswith("attention-")
    rows = [(r["tokens"], r["pass"], r["backend"]) for r in shown["kernels"]]
    assert rows == [
        (n, p, b) for n in (64, 90) for p in ("forward", "backward") for b in ("cpu-flash", "plain")
    ]
    assert shown["problem"]["mask"] == {"causal": True, "window": 20, "documents": 1}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 6, "kv_heads": 4}, "--kv-heads 4 does not divide --heads 6"),
        ({"record": Path("/no/such/folder")}, "is not a folder"),
        ({"tokens": [16, 64], "documents": 17}, "do not fit into 16 tokens"),
        ({"backend": ["fast"]}, "'fast' is unknown"),
        *([] if torch.cuda.is_available() else [({"device": On.cuda}, "no CUDA device")]),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        attention(**options)


def test_a_kernel_that_cannot_run_here_says_why_and_fails() -> None:
    done = bench("--device", "cpu", "-t", "32", "--quick", "--backend", "flash")
    assert done.returncode == 1 and "not run: flash: runs on cuda" in done.stdout


def test_ctrl_c_leaves_no_traceback() -> None:
    command = [sys.executable, "-m", "counterpoint", "bench", "attention", "--device", "cpu", "-t", "4096"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background job ignores it
    )
    time.sleep(6)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
