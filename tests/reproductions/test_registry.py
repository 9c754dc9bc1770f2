"""The table of systems is complete, and what it calls reproduced can be loaded."""

from __future__ import annotations

import re

import pytest

from counterpoint.reproductions.check import KINDS
from counterpoint.reproductions.registry import TABLE, find, load, systems


def test_all_systems_are_there_once():
    names = [system.name for system in systems()]
    assert len(names) == 76
    assert names == sorted(set(names))
    assert (
        len(re.findall(r"^[a-z0-9-]+:", TABLE.read_text("utf-8"), re.MULTILINE)) == 76
    )  # YAML drops duplicates
    assert len({system.arxiv for system in systems()}) == len({system.title for system in systems()}) == 76


def test_every_row_is_filled_in():
    for system in systems():
        assert re.fullmatch(r"\d{4}\.\d{4,5}", system.arxiv), system
        assert 2010 <= system.year <= 2026
        assert system.title
        assert system.room
        assert system.state in ("reproduced", "planned")


def test_what_is_reproduced_loads_and_what_is_planned_says_so():
    done = [system for system in systems() if system.state == "reproduced"]
    assert {system.name for system in done} >= {
        "tokenring", "ulysses", "sequence-parallelism-rsa", "flashattention-2", "flexsp", "bytescale", "fasterpam",
        "lasp-2",
    }  # fmt: skip
    for system in done:
        reproduction = load(system)
        assert reproduction.summary
        assert {check.kind for check in reproduction.checks} <= set(KINDS)
        assert {"exact", "simulated"} <= set(reproduction.kinds())
        if system.room == "strategies" and system.name != "flexsp":
            assert "bytes" in reproduction.kinds()
        claims = [(check.claim, check.source) for check in reproduction.checks]
        assert len(set(claims)) == len(claims), "two checks look the same in the table"
    with pytest.raises(ValueError, match=r"gpipe .* is planned"):
        load(find("gpipe"))


def test_names_and_their_mistakes():
    assert find("rsa") is find("sequence-parallelism-rsa")
    with pytest.raises(ValueError, match="did you mean 'tokenring'"):
        find("tokenrng")
