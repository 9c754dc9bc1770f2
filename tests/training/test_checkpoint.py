"""Checkpoints: whole or not there, verified, the newest good one found, on a full disk too."""

import errno
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Decoder
from counterpoint.training import checkpoint
from counterpoint.training.checkpoint import (
    CheckpointError,
    RunState,
    check,
    find,
    list_checkpoints,
    load,
    save,
)
from counterpoint.training.config import OptimizerConfig
from counterpoint.training.mesh import Processes
from counterpoint.training.optimizer import make_optimizer

ALONE = Processes(0, 1, 0, 1, 0, 1, torch.device("cpu"))


def make(seed: int = 0, steps: int = 2):
    model = Decoder(ModelConfig.preset("tiny"), seed)
    optimizer = make_optimizer(model, OptimizerConfig())  # type: ignore[call-arg]
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return model, optimizer


def state(step: int) -> RunState:
    return RunState(step, 10 * step, {"epoch": step}, {"a": 1}, {"b": [1, 2]})


def write(folder: Path, *steps: int, keep: int = 9) -> None:
    model, optimizer = make()
    for step in steps:
        save(folder, model, optimizer, state(step), keep, ALONE)


def test_everything_comes_back(tmp_path):
    model, optimizer = make()
    torch.manual_seed(5)
    path = save(tmp_path, model, optimizer, state(2), 1, ALONE)
    expected = torch.rand(3)
    other, other_optimizer = make(seed=1, steps=0)
    torch.manual_seed(99)
    load(path, other, other_optimizer, ALONE)
    assert torch.equal(torch.rand(3), expected)
    assert checkpoint.read_state(path) == state(2)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[p][key], other_optimizer.state[q][key]), (name, key)


def test_only_the_newest_are_kept(tmp_path):
    write(tmp_path, 5, 10, 15, 20, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000020", "step-00000015"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000015", "step-00000020"]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_newest_falls_back_and_names_the_file(tmp_path, name, damage):
    if (damage, name) == (flip, "manifest.json"):
        pytest.skip("a flipped bit may hit white space")
    write(tmp_path, 5, 10)
    damage(tmp_path / "step-00000010" / name)
    warnings: list[str] = []
    assert find(tmp_path, ALONE, warnings.append) == tmp_path / "step-00000005"
    assert len(warnings) == 1 and "step-00000010" in warnings[0] and name in warnings[0]
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000005"]
    write(tmp_path, 10)
    assert find(tmp_path, ALONE, warnings.append) == tmp_path / "step-00000010"


def test_all_damaged_is_an_error_and_leaves_them_in_place(tmp_path):
    write(tmp_path, 5, 10)
    for file in tmp_path.glob("*/__0_0.distcp"):
        truncate(file)
    for _ in range(2):  # also when started again: never from the beginning without a word
        with pytest.raises(ValueError, match=r"no checkpoint is whole, .*__0_0.distcp has"):
            find(tmp_path, ALONE, lambda text: None)


def test_a_run_killed_while_writing_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    write(tmp_path, 5)
    monkeypatch.setattr(checkpoint, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 10)
    monkeypatch.undo()
    assert find(tmp_path, ALONE, pytest.fail) == tmp_path / "step-00000005"
    write(tmp_path, 15)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005", "step-00000015"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_error_and_the_last_checkpoint_survives(small_disk):
    folder = small_disk / "checkpoints"
    write(folder, 5)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "other").write_bytes(bytes(free - 300_000))
    with pytest.raises(CheckpointError) as error:
        write(folder, 10)
    message = str(error.value)
    assert "step 10 could not be written" in message and "the disk is full" in message
    assert "step-00000005 is intact" in message
    assert [p.name for p in folder.iterdir()] == ["step-00000005"]
    assert check(folder / "step-00000005", ALONE) is None


@pytest.mark.parametrize("where", ["_write_synced", "_sync_directory"])
def test_a_disk_that_fills_up_at_the_last_moment(tmp_path, monkeypatch, where):
    write(tmp_path, 5)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, where, full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        write(tmp_path, 10)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    assert check(tmp_path / "step-00000005", ALONE) is None


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path):
    with pytest.raises(ValueError, match=r"is not a checkpoint: it has no state.json"):
        checkpoint.read_state(tmp_path)
