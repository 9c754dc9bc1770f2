"""`counterpoint reproduce`: tables, JSON, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner, Result

from counterpoint.cli.app import app
from counterpoint.reproductions import registry
from counterpoint.reproductions.check import Check, Reproduction, Tolerance

FIELDS = {
    "claim", "claimed", "unit", "source", "kind", "tolerance", "got", "difference", "verdict", "note", "error",
}  # fmt: skip


def reproduce(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["reproduce", *arguments])


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "counterpoint", "reproduce", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_list_shows_every_system_and_what_is_checked():
    shown = reproduce("--list")
    assert shown.exit_code == 0
    for system in registry.systems():
        assert system.name in shown.output
    done = sum(system.state == "reproduced" for system in registry.systems())
    assert f"76 published systems, {done} reproduced" in shown.output
    assert shown.output.count("results and gradients against one process") >= 3


def test_the_list_as_json():
    rows = json.loads(reproduce("--list", "--json").output)
    assert len(rows) == 76
    counts = {row["name"]: row["checks"] for row in rows if row["state"] == "reproduced"}
    assert set(counts) == {system.name for system in registry.systems() if system.state == "reproduced"}
    assert all(n["exact"] and n["simulated"] for n in counts.values())
    assert all(row["summary"] is None and row["checks"] == {} for row in rows if row["state"] == "planned")


def test_a_table_of_claims():
    shown = reproduce("tokenring", "--only", "bytes")
    assert shown.exit_code == 0
    assert "147,456,000 bytes" in shown.output
    assert "13 of 13 claims come out within their tolerance" in shown.output


def test_json_of_results():
    report = json.loads(reproduce("rsa", "--only", "bytes", "--json").output)
    assert (report["name"], report["arxiv"], report["holds"]) == (
        "sequence-parallelism-rsa",
        "2105.13120",
        True,
    )
    for row in report["checks"]:
        assert set(row) == FIELDS
        assert row["kind"] == "bytes"
        assert set(row["tolerance"]) == {"relative", "absolute", "side"}
        assert row["verdict"] == "holds"
        assert abs(row["got"] - row["claimed"]) <= 1e-6 * row["claimed"]


def test_a_claim_that_does_not_come_out_ends_with_1_and_the_reason(monkeypatch: pytest.MonkeyPatch):
    near = Tolerance(relative=0.1)
    checks = (
        Check("comes out", 10.0, "ms", "table 1", "simulated", near, lambda bench: 10.5),
        Check("does not", 10.0, "ms", "table 1", "simulated", near, lambda bench: 12.0, "the moon was full"),
    )
    monkeypatch.setattr(registry, "load", lambda system: Reproduction(system.name, "two claims", checks))
    monkeypatch.setattr("counterpoint.reproductions.show.load", registry.load)
    shown = reproduce("tokenring")
    assert shown.exit_code == 1
    assert "+20.0 %" in shown.output
    assert "outside [1]" in shown.output
    assert "[1] the moon was full" in shown.output
    assert "1 of 2 claims" in shown.output
    found = reproduce("tokenring", "--json")
    assert found.exit_code == 1
    assert [row["verdict"] for row in json.loads(found.output)["checks"]] == ["holds", "outside"]
    assert not json.loads(found.output)["holds"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenrng"], "did you mean 'tokenring'"),
        (["gpipe"], "gpipe (arXiv 1811.06965) is planned, not reproduced yet"),
        (["ulysses", "--only", "emulated"], "has no checks that are emulated"),
        ([], "give the name of a system, or --list"),
        (["tokenring", "--only", "guessed"], "guessed"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], message: str):
    done = command(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout
