"""The published systems, and the reproductions that exist of them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import yaml

from counterpoint.cluster.schema import nearest
from counterpoint.reproductions.check import Reproduction

TABLE = Path(__file__).with_name("systems.yaml")


@dataclass(frozen=True, slots=True)
class System:
    """A published system: its name here, the paper, the room of the package it belongs to, and how far we are."""

    name: str
    title: str
    year: int
    arxiv: str
    room: str
    state: Literal["reproduced", "planned"]
    alias: str = ""


@lru_cache(maxsize=1)
def systems() -> tuple[System, ...]:
    """All systems, sorted by name."""
    return tuple(System(name, **row) for name, row in yaml.safe_load(TABLE.read_text("utf-8")).items())


def find(name: str) -> System:
    """The system of this name or alias. Raises ValueError for an unknown one, with the nearest that is known."""
    for system in systems():
        if name in (system.name, system.alias):
            return system
    known = [word for system in systems() for word in (system.name, system.alias) if word]
    raise ValueError(
        f"no system '{name}'{nearest(name, known)}; counterpoint reproduce --list shows all {len(systems())}"
    )


def load(system: System) -> Reproduction:
    """The checks of a system. Raises ValueError when it is only planned."""
    if system.state != "reproduced":
        done = ", ".join(s.alias or s.name for s in systems() if s.state == "reproduced")
        raise ValueError(
            f"{system.name} (arXiv {system.arxiv}) is planned, not reproduced yet; there are {done}"
        )
    module = importlib.import_module(f"counterpoint.reproductions.{system.name.replace('-', '_')}")
    reproduction: Reproduction = module.REPRODUCTION
    assert reproduction.name == system.name, f"{module.__name__} holds {reproduction.name}"
    return reproduction
