"""Where things are kept between runs, and how files appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


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
