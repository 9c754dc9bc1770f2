"""`counterpoint calibrate`: mistakes before anything is measured, and what is kept is used again."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from calibration.made import calibration
from counterpoint.calibration.cache import cache_file, load_cached
from counterpoint.calibration.machine import this_machine
from counterpoint.calibration.text import FIRST_LINE
from counterpoint.cluster.load import load_cluster
from counterpoint.files import write_whole


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "XDG_CACHE_HOME": str(cwd / "cache")}
    command = [sys.executable, "-m", "counterpoint", "calibrate", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["-o", "missing/m.yaml"], "there is no directory missing; make it or choose another"),
        (["-o", "."], "is a directory; give a file"),
        (["-o", "mine.yaml"], "exists and was not written by calibrate; choose another or remove it"),
        (["-o", "/proc/m.yaml"], "/proc/m.yaml cannot be written"),
        (["--ranks", "0"], "Invalid value for '--ranks'"),
        (["--fast"], "No such option"),
    ],
)
def test_a_mistake_is_one_line_and_costs_nothing(arguments, error, tmp_path):
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert error in done.stderr and done.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.yaml"]
    assert (tmp_path / "mine.yaml").read_text() == "name: mine\n"


def kept_calibration(folder: Path, ranks: int) -> Path:
    machine = this_machine()
    path = cache_file(machine, ranks, False, True, {"XDG_CACHE_HOME": str(folder)})
    path.parent.mkdir(parents=True)
    path.write_text(dataclasses.replace(calibration(ranks), machine=machine).to_json())
    return path


@pytest.mark.skipif(bool(this_machine().accelerators), reason="where there are GPUs, they are measured")
def test_what_was_measured_before_is_used_again(tmp_path):
    kept_calibration(tmp_path / "cache", 3)
    (tmp_path / "this-machine.yaml").write_text(f"{FIRST_LINE}, earlier\n")  # may be replaced
    done = run("--quick", "--ranks", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "measured on 2026-11-22T10:00:00+00:00; --refresh measures it again" in " ".join(
        done.stdout.split()
    )
    cluster = load_cluster(tmp_path / "this-machine.yaml")
    assert cluster.world_size == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "this-machine.yaml"]


def test_another_torch_machine_or_way_to_measure_is_kept_elsewhere(tmp_path):
    machine, env = this_machine(), {"XDG_CACHE_HOME": str(tmp_path)}
    other = dataclasses.replace(machine, torch="2.0.0")
    found = {
        cache_file(m, ranks, gpus, quick, env)
        for m in (machine, other)
        for ranks in (2, 3)
        for gpus in (False, True)
        for quick in (False, True)
    }
    assert len(found) == 16 and all(p.is_relative_to(tmp_path) for p in found)
    relative = cache_file(machine, 2, False, True, {"XDG_CACHE_HOME": "here", "HOME": "/home/me"})
    assert relative.is_relative_to("/home/me/.cache")  # the standard says to ignore relative ones


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"machine": 3}', "\x00"])
def test_a_damaged_cache_counts_as_none(damage, tmp_path):
    path = kept_calibration(tmp_path, 2)
    assert load_cached(path) is not None
    path.write_text(damage)
    assert load_cached(path) is None
    assert load_cached(tmp_path / "nothing") is None


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "m.yaml"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("m.yaml", "old")]
