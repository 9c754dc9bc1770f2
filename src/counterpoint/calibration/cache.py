"""Where calibrations are kept between runs, and how files appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from counterpoint.calibration.measurement import Calibration, Machine

FORMAT = 1  # raised when what is measured, or how, changes


def cache_file(machine: Machine, ranks: int, gpus: bool, quick: bool, environ: Mapping[str, str]) -> Path:
    """The file for this machine, torch version and way to measure, in the user's cache directory (XDG)."""
    named = environ.get("XDG_CACHE_HOME", "")
    root = Path(named) if os.path.isabs(named) else Path(environ.get("HOME") or "~").expanduser() / ".cache"
    key = json.dumps([FORMAT, asdict(machine), ranks, gpus, quick], sort_keys=True)
    return root / "counterpoint" / f"calibration-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def load_cached(path: Path) -> Calibration | None:
    """The calibration kept in this file; None when there is none that can be read."""
    try:
        return Calibration.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


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
