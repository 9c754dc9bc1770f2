"""A rank dies, hangs or fails: every other rank raises PeerFailure that names it and a step, within the timeout."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch

import counterpoint
from counterpoint.kernels import blocks
from counterpoint.runtime.errors import PeerFailure
from counterpoint.strategies.sequence.layout import SequenceLayout
from support.processes import Workers, mesh

TIMEOUT = 5.0
WORLD_SIZE = 4


def attend_until(rank: int, victim: int, how: str, call: int, strategy: str, layout: str | None) -> Any:
    """A job: attention again and again; on the victim's `call`-th block, in the middle of a step, `how` happens."""
    calls, attend = count(), blocks.attend

    def attend_or_fail(*args, **options):
        if rank == victim and next(calls) == call:
            if how == "raise":
                raise FloatingPointError("the victim's own trouble")
            os.kill(os.getpid(), getattr(signal, how))
        return attend(*args, **options)

    blocks.attend = attend_or_fail
    tokens = 2048
    given = layout or SequenceLayout("zigzag", tokens, WORLD_SIZE)
    local = SequenceLayout("zigzag", tokens, WORLD_SIZE).local_tokens(rank)
    q, k, v = torch.randn(3, 1, 4, local, 32).unbind()
    started = time.monotonic()
    try:
        for _ in range(20):
            started = time.monotonic()
            counterpoint.attention(
                q, k, v, mesh=mesh(WORLD_SIZE), layout=given, forward=strategy, causal=False, timeout=TIMEOUT
            )
    except PeerFailure as failure:
        return failure.rank, failure.step, str(failure), time.monotonic() - started
    except FloatingPointError as failure:
        return str(failure)
    return "nothing happened"


# victim, how, who keeps the store, strategy, layout (by name: lengths are exchanged first)
CASES = [
    (2, "SIGKILL", "parent", "ring", None),
    (0, "SIGKILL", "rank0", "ring", "zigzag"),
    (1, "SIGKILL", "rank0", "allgather", None),
    (2, "SIGSTOP", "parent", "ring", None),
    (0, "SIGSTOP", "rank0", "tokenring", "zigzag"),
    (2, "raise", "parent", "allgather", "zigzag"),
    (0, "raise", "rank0", "tokenring", None),
]


@pytest.fixture(scope="module")
def answers() -> Iterator[list[dict[int, tuple[str, Any]]]]:
    """What the ranks of every case answered. The cases wait for timeouts, so they run side by side."""
    groups = [Workers(WORLD_SIZE, store=store) for _, _, store, _, _ in CASES]
    try:
        for workers, (victim, how, _, strategy, layout) in zip(groups, CASES, strict=True):
            workers.start(attend_until, victim, how, 5, strategy, layout)
        deadline = time.monotonic() + 2 * TIMEOUT + 5
        yield [workers.outcomes(max(1.0, deadline - time.monotonic())) for workers in groups]
    finally:
        for workers in groups:
            workers.close()
        assert not any(process.is_alive() for workers in groups for process in workers.processes)


@pytest.mark.processes
@pytest.mark.parametrize("case", range(len(CASES)), ids=[" ".join(map(str, case)) for case in CASES])
def test_every_other_rank_names_the_lost_one(case: int, answers: list[dict[int, tuple[str, Any]]]) -> None:
    victim, how, *_ = CASES[case]
    told = dict(answers[case])
    lost = told.pop(victim, None)
    if how == "raise":
        assert lost == ("result", "the victim's own trouble"), "a rank's own error is not replaced by another"
    assert sorted(told) == [rank for rank in range(WORLD_SIZE) if rank != victim], f"ranks hang: {told}"
    for what, answer in told.values():
        assert what == "result", answer
        blamed, step, message, seconds = answer
        assert blamed == victim, message
        assert f"rank {victim} died or stopped answering" in message and step in message
        assert step.startswith("step ") and "\n" not in message
        assert seconds < TIMEOUT + 2, message


def attend_twice(rank: int) -> list[str]:
    """A job: rank 1 fails in its own kernel; what the next call on the same mesh says."""
    said = []
    attend = blocks.attend
    for call in range(2):
        if rank == 1 and call == 0:
            blocks.attend = lambda *args, **options: [][0]
        else:
            blocks.attend = attend
        q = torch.randn(1, 2, 16, 8)
        try:
            counterpoint.attention(q, q, q, mesh=mesh(2), forward="ring", timeout=TIMEOUT)
        except (RuntimeError, IndexError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


@pytest.mark.processes
def test_a_mesh_whose_connections_are_gone_says_so_at_once() -> None:
    workers = Workers(2)
    try:
        started = time.monotonic()
        first, second = workers.run(attend_twice)
        assert time.monotonic() - started < TIMEOUT + 3
        assert [x.split(":")[0] for x in first] == ["PeerFailure", "PeerFailure"] and first[0] == first[1], (
            first
        )
        assert second[0].startswith("IndexError") and second[1].startswith("RuntimeError"), second
        assert "closed when an earlier step failed" in second[1] and "\n" not in second[1]
    finally:
        workers.close()
