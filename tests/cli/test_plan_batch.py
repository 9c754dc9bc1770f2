"""`counterpoint plan batch`: a table, JSON, saved plans, pictures, MILPs, and one line for a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from counterpoint.planner.batch import BatchPlan
from counterpoint.planner.milp_library import check_instance

BASE = ["--model", "smollm2-135m", "--cluster", "dgx-a100", "--tokens-per-rank", "2048"]


def plan(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "counterpoint", "plan", "batch", *BASE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


def test_everything_it_writes(tmp_path: Path) -> None:
    (tmp_path / "lengths.txt").write_text(" ".join(map(str, [5000, 3000, 700, 500, 80, 80, 40, 4000])))
    done = plan(
        "--lengths", "lengths.txt", "--json", "--plan", "best.json", "--picture", "plans.png", "--export-mps", "milps",
        "--ranks", "4", "--workers", "0", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    times = [a["prediction"]["seconds"] for a in found["answers"]]
    assert times == sorted(times)
    best = BatchPlan.from_json(json.loads((tmp_path / "best.json").read_text()))
    assert best.seconds == times[0]
    assert best.solver == found["answers"][0]["solver"]
    assert (tmp_path / "plans.png").read_bytes().startswith(b"\x89PNG")
    assert found["exported"]
    for path in found["exported"]:
        about = json.loads((tmp_path / path).with_suffix(".json").read_text())
        assert {
            "family",
            "parameters",
            "seed",
            "best_known_objective",
            "trajectory",
            "licence",
            "hardness",
        } <= about.keys()
        if about["status"] == "optimal":
            stored, again = check_instance(tmp_path / path)
            assert again == pytest.approx(stored, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --lengths FILE or --distribution NAME"),
        (["--distribution", "wiki"], "no distribution 'wiki'; there are wikipedia-like"),
        (["--lengths", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--distribution", "github-like", "--solver", "magic"], "no solver 'magic'; there are static"),
        (["--distribution", "github-like", "--ranks", "9"], "9 ranks were asked for"),
        (["--distribution", "github-like", "--picture", "plan.pdf"], "a picture is written as .png or .svg"),
        (["--distribution", "byted-like", "--context", "900000", "--sequences", "4000"], "ranks hold"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = plan(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
