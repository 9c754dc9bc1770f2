"""Temporary folders: gone on the way out, and those of killed processes at the next occasion."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from counterpoint.files import ALIVE, YOUNG, scratch

HOLD = (
    "from counterpoint.files import scratch\nwith scratch() as folder:\n print(folder, flush=True)\n input()"
)


def holder() -> tuple[subprocess.Popen, Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def age(folder: Path) -> None:
    long_ago = (folder / ALIVE).stat().st_mtime - 2 * YOUNG
    os.utime(folder / ALIVE, (long_ago, long_ago))


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_a_folder_is_there_inside_and_gone_outside():
    with scratch() as folder:
        Path(folder, "file").write_text("x")
    assert not Path(folder).exists()


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not():
    dead, left = holder()
    alive, used = holder()
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert left.is_dir() and used.is_dir()
    with scratch():
        assert left.is_dir(), "it is so young that it may not have been locked yet"
    age(left)
    age(used)
    with scratch():
        assert not left.exists() and used.is_dir()
    alive.communicate("\n")
    assert alive.returncode == 0 and not used.exists()
