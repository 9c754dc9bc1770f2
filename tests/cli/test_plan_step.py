"""`counterpoint plan step`: figures for programs, and one line for what cannot be."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from counterpoint.cli.app import app


def run(*arguments: str):
    return CliRunner().invoke(app, ["plan", "step", *arguments])


def test_figures_add_up() -> None:
    result = run(
        "--set", "parallel.sequence=2", "--set", "training.global_batch=2", "--cluster", "dgx-h100", "--json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert sum(found["phases"].values()) == pytest.approx(found["seconds"], rel=0.02)
    assert found["tokens_per_second"] == pytest.approx(2 * 1024 / found["seconds"])
    assert 0 < found["state_bytes"] < found["peak_bytes"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--cluster", "nowhere"), "no cluster 'nowhere'"),
        (("--cluster", "a10x4-pcie", "--set", "parallel.sequence=8"), "needs 8 ranks"),
        (
            ("--cluster", "dgx-h100", "--set", "memory.layers=stream(4)"),
            "no schedule for memory policy stream",
        ),
        (("--cluster", "edge-lan", "--set", "memory.layers=offload"), "name no host memory"),
        (("--set", "memory.layers=offload(0.5)"), "name one with --cluster"),
    ],
)
def test_mistakes_are_said_in_a_line(arguments: tuple[str, ...], said: str) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, ValueError) and said in str(result.exception)
