"""Plans made ahead by other processes: in order, alike for any number of workers, errors passed on, a clean end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from counterpoint.planner.ahead import PlanAhead
from counterpoint.planner.batch import BatchPlan
from counterpoint.planner.batch_solvers.flexsp import FlexspOptions, flexsp
from counterpoint.planner.batch_solvers.static import static
from counterpoint.planner.workers import WorkerError, run_all
from support.batches import small_cost

QUICK = partial(flexsp, options=FlexspOptions(tries=2, effort=0))
BATCHES = [[100 * i + j for j in range(1, 20)] for i in range(1, 5)]


@pytest.mark.processes
def test_plans_do_not_depend_on_the_number_of_workers() -> None:
    cost = small_cost(4)
    expected = [QUICK(batch, cost) for batch in BATCHES]
    for workers in (1, 2):
        with PlanAhead(QUICK, cost, workers=workers) as planner:
            indices = [planner.submit(batch) for batch in BATCHES]
            assert indices == [0, 1, 2, 3]
            with pytest.raises(ValueError, match="ahead is 4"):
                planner.submit([1])
            assert [planner.get(i) for i in indices] == expected
            with pytest.raises(ValueError, match="batch 0 was not submitted, or its plan has been fetched"):
                planner.get(0)


@pytest.mark.processes
def test_errors_arrive_in_one_line_and_the_next_batch_is_planned() -> None:
    with PlanAhead(static, small_cost(4)) as planner:
        with pytest.raises(ValueError, match="the batch is empty"):
            planner.submit([])
        bad, good = planner.submit([10**6]), planner.submit([100])
        with pytest.raises(ValueError, match="planning batch 0 failed: sequence 0 has 1,000,000 tokens"):
            planner.get(bad)
        assert isinstance(planner.get(good), BatchPlan)


@pytest.mark.processes
def test_a_task_that_hangs_or_dies_is_an_error_and_others_go_on() -> None:
    tasks = [(time.sleep, (60,)), (abs, (-3,)), (os.kill, (0, 77)), (os._exit, (5,)), (abs, (-4,))]
    start = time.monotonic()
    found = run_all(tasks, workers=2, seconds=3.0)
    assert time.monotonic() - start < 20
    assert isinstance(found[0][1], TimeoutError)
    assert found[1] == (3, None)
    assert found[4] == (4, None)
    assert isinstance(found[2][1], WorkerError)
    assert "exit code 5" in str(found[3][1])


@pytest.mark.processes
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(how: signal.Signals, tmp_path: Path) -> None:
    program = (
        "import os, sys, time\n"
        "from counterpoint.planner.workers import Worker\n"
        "workers = [Worker() for _ in range(2)]\n"
        "for w in workers: w.begin(time.sleep, (60,), 100)\n"
        "print(*(w.process.pid for w in workers), flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert parent.stdout is not None
    pids = [int(x) for x in parent.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(1.0)
    parent.send_signal(how)
    parent.wait(10)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
