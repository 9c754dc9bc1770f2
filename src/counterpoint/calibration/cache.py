"""Where calibrations are kept between runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from counterpoint.calibration.measurement import Calibration, Machine
from counterpoint.files import cache_directory

FORMAT = 1  # raised when what is measured, or how, changes


def cache_file(machine: Machine, ranks: int, gpus: bool, quick: bool, environ: Mapping[str, str]) -> Path:
    """The file for this machine, torch version and way to measure, in the user's cache directory (XDG)."""
    key = json.dumps([FORMAT, asdict(machine), ranks, gpus, quick], sort_keys=True)
    return cache_directory(environ) / f"calibration-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def load_cached(path: Path) -> Calibration | None:
    """The calibration kept in this file; None when there is none that can be read."""
    try:
        return Calibration.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
