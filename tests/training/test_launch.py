"""Workers: started with what they need, signalled once, never left behind. No torch: they start fast."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from counterpoint.training.launch import WorkerFailure, launch, worker_from

pytestmark = pytest.mark.processes

REPORT = """
import os, sys, time
from counterpoint.training.launch import worker_from, write_report, die_with_parent
worker = worker_from(os.environ)
die_with_parent(worker.parent)
"""


def write(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "worker.py"
    file.write_text(REPORT + text)
    return [str(file)]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def pids(tmp_path: Path, n: int) -> list[int]:
    wait_for(lambda: len(list(tmp_path.glob("pid-*"))) == n)
    return [int(p.name[4:]) for p in tmp_path.glob("pid-*")]


TELL_PID = "open(f'{DIR}/pid-{os.getpid()}', 'w').close()\n"


def test_each_worker_knows_its_place_and_its_share_of_the_cores(tmp_path):
    text = "open(f'{sys.argv[1]}/{worker.rank}', 'w').write(f'{worker} {os.environ[\"OMP_NUM_THREADS\"]}')"
    environ = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    assert launch([*write(tmp_path, text), str(tmp_path)], 3, environ) == 0
    told = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    threads = max(1, len(os.sched_getaffinity(0)) // 3)
    assert all(f"rank={rank}, world_size=3, local_rank={rank}" in t for rank, t in enumerate(told))
    assert all(t.endswith(f" {threads}") for t in told)
    assert "listen_fd=None" not in told[0] and "listen_fd=None" in told[1]


@pytest.mark.parametrize("sign", ["SIGKILL", "SIGSEGV"])
def test_a_killed_worker_is_named_and_the_others_do_not_linger(tmp_path, sign):
    text = (
        TELL_PID + f"import signal\nif worker.rank == 1: os.kill(os.getpid(), signal.{sign})\ntime.sleep(60)"
    ).replace("{DIR}", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(WorkerFailure, match=f"rank 1 was killed by {sign}") as failure:
        launch(write(tmp_path, text), 3, os.environ, grace=0.5)
    assert failure.value.exit_code == 1
    assert time.monotonic() - began < 10
    assert not any(alive(pid) for pid in pids(tmp_path, 3))


def test_the_first_cause_is_reported_not_what_followed(tmp_path):
    text = """
if worker.rank == 1:
    time.sleep(0.3)
    write_report(worker, ValueError("the file is empty"), user=True, secondary=False)
    sys.exit(2)
write_report(worker, RuntimeError("rank 1 is gone"), user=False, secondary=True)
sys.exit(1)
"""
    with pytest.raises(WorkerFailure, match=r"^rank 1: the file is empty$") as failure:
        launch(write(tmp_path, text), 3, os.environ, grace=5)
    assert failure.value.exit_code == 2


def test_a_worker_that_hangs_is_the_one_that_said_nothing(tmp_path):
    text = """
if worker.rank == 1: time.sleep(60)
write_report(worker, RuntimeError("timed out"), user=False, secondary=True)
sys.exit(1)
"""
    with pytest.raises(WorkerFailure, match=r"^rank 1 stopped answering \(timed out\)$") as failure:
        launch(write(tmp_path, text), 3, os.environ, grace=0.5)
    assert failure.value.exit_code == 1 and not failure.value.trace


def test_a_mistake_that_all_workers_find_is_told_once_without_a_rank(tmp_path):
    text = "write_report(worker, ValueError('bad'), user=True, secondary=False); sys.exit(2)"
    with pytest.raises(WorkerFailure, match=r"^bad$"):
        launch(write(tmp_path, text), 2, os.environ)


def test_a_bug_keeps_its_traceback(tmp_path):
    text = """
try:
    [].pop()
except IndexError as error:
    write_report(worker, error, user=False, secondary=False)
sys.exit(1)
"""
    with pytest.raises(WorkerFailure) as failure:
        launch(write(tmp_path, text), 1, os.environ)
    assert "[].pop()" in failure.value.trace and failure.value.exit_code == 1


def test_port_in_use_is_refused_before_any_worker_starts(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} cannot be used .* give another --port"):
            launch(write(tmp_path, TELL_PID.replace("{DIR}", str(tmp_path))), 1, os.environ, port)
    assert not list(tmp_path.glob("pid-*"))


def parent(tmp_path: Path, text: str) -> subprocess.Popen:
    command = write(tmp_path, (TELL_PID + text).replace("{DIR}", str(tmp_path)))
    code = "import os, sys; from counterpoint.training.launch import launch; "
    code += f"sys.exit(launch({command}, 2, os.environ))"
    return subprocess.Popen([sys.executable, "-c", code])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_worker_once(tmp_path, number):
    text = """
from counterpoint.training.launch import StopSignal
with StopSignal() as stop:
    open('{DIR}/ready-' + str(worker.rank), 'w').close()
    while not stop.received: time.sleep(0.01)
    time.sleep(0.2)  # the step is finished
    open('{DIR}/saved-' + str(worker.rank), 'w').close()
    sys.exit(128 + stop.received)
"""
    process = parent(tmp_path, text)
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    process.send_signal(number)
    assert process.wait(10) == 128 + number
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_a_second_signal_ends_at_once(tmp_path):
    text = """
from counterpoint.training.launch import StopSignal
with StopSignal() as stop:
    open('{DIR}/ready-' + str(worker.rank), 'w').close()
    time.sleep(60)
"""
    process = parent(tmp_path, text)
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert time.monotonic() - began < 3
    assert not any(alive(pid) for pid in pids(tmp_path, 2))


def test_no_orphans_when_the_parent_is_killed(tmp_path):
    process = parent(tmp_path, "time.sleep(60)")
    workers = pids(tmp_path, 2)
    assert all(alive(pid) for pid in workers)
    process.kill()
    process.wait()
    wait_for(lambda: not any(alive(pid) for pid in workers), 5)


def test_environment_of_torchrun_is_understood_and_nonsense_refused():
    worker = worker_from({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_PORT": "1234"})
    assert worker is not None and (worker.rank, worker.local_rank, worker.port, worker.parent) == (
        3,
        1,
        1234,
        None,
    )
    assert worker_from({}) is None
    with pytest.raises(ValueError, match="RANK=8 is outside WORLD_SIZE=8"):
        worker_from({"RANK": "8", "WORLD_SIZE": "8"})
    with pytest.raises(ValueError, match="not a number"):
        worker_from({"RANK": "zero", "WORLD_SIZE": "8"})


def test_launching_from_a_thread_works(tmp_path):
    codes = []
    command = write(tmp_path, "pass")
    thread = threading.Thread(target=lambda: codes.append(launch(command, 2, os.environ)))
    thread.start()
    thread.join(20)
    assert codes == [0]
