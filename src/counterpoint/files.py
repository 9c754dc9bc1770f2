"""Where things are kept between runs, and how files appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

SCRATCH = "counterpoint-"  # how the folders of `scratch` are called
ALIVE = ".alive"  # in them, locked by the process that made the folder
YOUNG = 60.0  # seconds in which a folder may not have been locked yet


def cache_directory(environ: Mapping[str, str]) -> Path:
    """The folder for what may be measured again, in the user's cache directory (XDG)."""
    named = environ.get("XDG_CACHE_HOME", "")
    root = Path(named) if os.path.isabs(named) else Path(environ.get("HOME") or "~").expanduser() / ".cache"
    return root / "counterpoint"


def write_whole(path: Path, text: str) -> None:
    """Write a file so that whoever reads it sees the old or the new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def scratch() -> Iterator[str]:
    """A temporary folder, removed on the way out; those that killed processes have left are removed on the way in."""
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*/{ALIVE}"):
        if _abandoned(left):
            shutil.rmtree(left.parent, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as folder, Path(folder, ALIVE).open("w") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        yield folder


def _abandoned(alive: Path) -> bool:
    try:
        if time.time() - alive.stat().st_mtime < YOUNG:
            return False
        with alive.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:  # it is locked, another user's, or just gone
        return False
