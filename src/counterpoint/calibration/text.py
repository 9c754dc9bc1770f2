"""Cluster files with comments: YAML that says beside every figure how far to trust it."""

from __future__ import annotations

from typing import Any

import yaml

from counterpoint.calibration.describe import Comments, Place, describe, plain
from counterpoint.calibration.measurement import Calibration
from counterpoint.cluster.cluster import Cluster
from counterpoint.cluster.load import parse_cluster

FIRST_LINE = "# Written by counterpoint calibrate"


def cluster_text(calibration: Calibration) -> tuple[str, Cluster]:
    """The cluster file of a calibrated machine, and the cluster that it reads back as."""
    cluster, comments = describe(calibration)
    lines = [
        f"{FIRST_LINE}, {calibration.date}, on {calibration.machine.host}.",
        "# Bytes, bytes/s, seconds, FLOP, FLOP/s; a table gives the rate at each size. Keys: docs/cluster.md",
        *_lines(plain(cluster), (), comments, ""),
    ]
    text = "\n".join(lines) + "\n"
    return text, parse_cluster(text, "the calibrated cluster")


def _lines(value: Any, place: Place, comments: Comments, indent: str) -> list[str]:
    """A mapping or list as YAML lines, each scalar with the comment of its place."""
    lines = []
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in entries:
        here = (*place, key)
        head = f"{indent}{_scalar(key)}:" if isinstance(value, dict) else f"{indent}-"
        note = f"  # {comments[here]}" if here in comments else ""
        if isinstance(entry, dict | list) and entry:
            inner = _lines(entry, here, comments, indent + "  ")
            if isinstance(value, list):
                inner[0] = head + " " + inner[0].lstrip()
                lines += inner
            else:
                lines += [head + note, *inner]
        else:
            lines.append(f"{head} {_scalar(entry)}{note}")
    return lines


def _scalar(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
    )
