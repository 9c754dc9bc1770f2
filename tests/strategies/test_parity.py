"""Every strategy, forward and backward, equals one process: a fixed grid over all factors, and sampled combinations."""

from __future__ import annotations

import pytest

from support.cases import planned, run_case
from support.grid import STRATEGIES, grid

TOLERANCE = 2e-5
CASES = {name: case for strategy in STRATEGIES for name, case in grid(strategy).items()}


@pytest.mark.parametrize("name", CASES)
def test_grid(name: str) -> None:
    outcome = run_case(CASES[name])
    assert outcome.worst < TOLERANCE, outcome.errors
    for n in (0, 1):
        assert outcome.sent[n] == outcome.received[n] == planned(outcome.schedules[n])
        for rank, line in enumerate(outcome.timelines[n]):
            assert line.bytes_by_link() == {k: b for k, b in outcome.sent[n].items() if k[0] == rank}
