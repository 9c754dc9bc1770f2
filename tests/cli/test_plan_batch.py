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
    assert times[1:] == sorted(times[1:]) and times[0] <= 1.01 * min(times)
    assert {tuple(a["strategies"].items()) for a in found["answers"]} == {
        (("full_attention", "ulysses"),), (("full_attention", "ring"),)
    }  # fmt: skip
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


def test_both_commands_give_one_table_for_mixed_layers_and_ragged_data(tmp_path: Path) -> None:
    """Every batch plan with every strategy of each type of layers; the parts add up; the same from both commands."""
    (tmp_path / "lengths.txt").write_text("9000 3000 700 500 80 80 40 4000")
    options = [
        "--model", "demo-hybrid", "--cluster", "dgx-a100", "--ranks", "4", "--lengths", "lengths.txt", "--effort", "0",
        "--tokens-per-rank", "4096", "--solver", "static", "--solver", "bytescale", "--json",
    ]  # fmt: skip
    found = []
    for command in ("attention", "batch"):
        words = [sys.executable, "-m", "counterpoint", "plan", command, *options]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    for one in found:
        one.pop("exported", None)
        for answer in one["answers"]:
            answer.pop("plan_seconds")
    assert found[0] == found[1]
    answers = found[0]["answers"]
    rows = {(a["solver"], *a["strategies"].values()) for a in answers}
    assert len(rows) == len(answers) == 2 * 2 * 4
    for answer in answers:
        p = answer["prediction"]
        for key in ("compute", "communication", "sent_bytes"):
            assert sum(share[key] for share in p["shares"]) == pytest.approx(p[key])
        assert p["compute"] + p["communication"] + p["idle"] == pytest.approx(p["seconds"])
        moved = [s for s in p["shares"] if s["name"] == "changes of layout"]
        shared = any(int(size) > 1 for size in answer["groups"])
        assert bool(moved) == (shared and answer["strategies"]["full_attention"] == "ring")
    assert "linear_attention: with" in found[0]["reason"] and "full_attention: with" in found[0]["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --lengths FILE or --distribution NAME"),
        (["--distribution", "wiki"], "no distribution 'wiki'; there are wikipedia-like"),
        (["--lengths", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--distribution", "github-like", "--solver", "magic"], "no solver 'magic'; there are static"),
        (["--distribution", "github-like", "--linear", "lasp"], "'lasp'"),
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
