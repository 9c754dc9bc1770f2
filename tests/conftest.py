"""Fixtures of the whole suite: pools of gloo processes, and how hypothesis samples."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from support.processes import Pools

settings.register_profile("counterpoint", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("counterpoint")


@pytest.fixture(scope="session")
def gloo() -> Iterator[Pools]:
    """Pools of processes that talk over gloo, one per world size: see support/processes.py."""
    pools = Pools()
    yield pools
    pools.close()
