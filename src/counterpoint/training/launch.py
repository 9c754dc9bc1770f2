"""Local workers: one process per rank, started, watched, signalled and reaped by one parent.

The workers get the variables that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), so
that a worker does not care who started it. Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from counterpoint.files import scratch

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Worker:
    """Who this process is among the workers of a run, and where they meet.

    `listen_fd` is a socket that the parent has bound for rank 0's store; `errors` a directory for the
    report of a failure; both None under torchrun. `parent` is the process to die with.
    """

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    listen_fd: int | None = None
    errors: Path | None = None
    parent: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker says of its own failure. `user`: a mistake to mend; `secondary`: a peer failed first."""

    rank: int
    message: str
    user: bool = False
    secondary: bool = False
    trace: str = ""
    time: float = 0.0


class WorkerFailure(RuntimeError):
    """A worker ended badly; the message says which and why, `exit_code` is the parent's."""

    def __init__(self, message: str, exit_code: int, trace: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.trace = trace


def worker_from(environ: Mapping[str, str]) -> Worker | None:
    """The worker that `environ` describes; None when this process was not started as one.

    Raises:
        ValueError: the variables are there but make no sense.
    """
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None

    def number(name: str, default: str) -> int:
        text = environ.get(name, default)
        if not text.isdecimal():
            raise ValueError(f"{name}={text!r} in the environment is not a number; let torchrun set it")
        return int(text)

    rank, world_size = number("RANK", ""), number("WORLD_SIZE", "")
    if not rank < world_size:
        raise ValueError(f"RANK={rank} is outside WORLD_SIZE={world_size}; ranks count from 0")
    return Worker(
        rank,
        world_size,
        number("LOCAL_RANK", str(rank)),
        environ.get("MASTER_ADDR", "127.0.0.1"),
        number("MASTER_PORT", "29500"),
        number("COUNTERPOINT_LISTEN_FD", "0") or None,
        Path(environ["COUNTERPOINT_ERRORS"]) if "COUNTERPOINT_ERRORS" in environ else None,
        number("COUNTERPOINT_PARENT", "0") or None,
    )


def launch(
    arguments: Sequence[str], world_size: int, environ: Mapping[str, str], port: int = 0, grace: float = 5.0
) -> int:
    """Runs `python arguments...` as `world_size` workers and waits for them; no worker outlives the call.

    SIGINT, SIGTERM and SIGHUP are passed on once (SIGINT as SIGTERM), so that the workers can finish their step and
    save; a second one kills them.

    Args:
        port: of the rendezvous on this machine; 0 takes a free one.
        grace: seconds the other workers get to fail by themselves after the first one did.

    Returns: 0, or 128 + the signal that was passed on.

    Raises:
        ValueError: the port is in use.
        WorkerFailure: a worker failed.
    """
    listener = _listen(port)
    workers: list[subprocess.Popen[bytes]] = []
    with scratch() as errors, _Forward(workers) as forward:
        try:
            for rank in range(world_size):
                env = _environment(environ, rank, world_size, listener, errors)
                fds = (listener.fileno(),) if rank == 0 else ()
                command = [sys.executable, *arguments]
                # a process group of its own: Ctrl-C reaches the workers once, through the parent
                workers.append(
                    subprocess.Popen(
                        command, env=env, pass_fds=fds, stdin=subprocess.DEVNULL, process_group=0
                    )
                )
            listener.close()
            ends = _wait(workers, forward, grace)
            return _outcome(ends, forward, _reports(Path(errors)))
        finally:
            listener.close()
            _kill(workers)


def write_report(worker: Worker, error: BaseException, user: bool, secondary: bool) -> None:
    """Leaves the failure of this worker where its parent looks; a full disk must not hide the failure."""
    if worker.errors is None:
        return
    trace = "" if user or secondary else "".join(traceback.format_exception(error))
    message = str(error) or type(error).__name__
    report = Report(worker.rank, message, user, secondary, trace, time.time())
    with suppress(OSError):
        path = worker.errors / f"rank-{worker.rank}.json"
        path.with_suffix(".part").write_text(json.dumps(asdict(report)))
        path.with_suffix(".part").rename(path)


def die_with_parent(parent: int) -> None:
    """Has this process killed when its parent is gone, however the parent ended."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


@dataclass(slots=True)
class StopSignal:
    """Remembers the first stop signal, so that a loop can finish its step; a second one ends the process."""

    received: int = 0
    _old: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> StopSignal:
        self._old = _install(self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received:
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h\n")  # a progress display has hidden the cursor
            os._exit(128 + number)
        self.received = number


def _install(handler: Any) -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}  # Python sets handlers in the main thread only
    # an ignored signal (nohup, a background job) stays ignored
    wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


# ---- the parent's side -------------------------------------------------------------------------------
class _Forward:
    """Passes stop signals on to the workers while it is entered."""

    def __init__(self, workers: list[subprocess.Popen[bytes]]) -> None:
        self.workers, self.number, self.count = workers, 0, 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> _Forward:
        self._old = _install(self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.count += 1
        self.number = self.number or number
        for process in self.workers:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if self.count > 1 else self.passed_on)

    @property
    def passed_on(self) -> int:
        """Ends a worker whose interpreter still starts without a word; SIGINT would show a traceback."""
        return signal.SIGTERM if self.number == signal.SIGINT else self.number


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"port {port} cannot be used ({error.strerror}); give another --port, or 0 for a free one"
        ) from None
    return listener


def _environment(
    environ: Mapping[str, str], rank: int, world_size: int, listener: socket.socket, errors: str
) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    address, port = listener.getsockname()
    # torch's native warnings about lost connections would bury the one error that the parent reports
    env = {"OMP_NUM_THREADS": str(max(1, cores // world_size)), "TORCH_CPP_LOG_LEVEL": "ERROR", **environ}
    env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    env |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    env |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    env |= {"COUNTERPOINT_ERRORS": errors, "COUNTERPOINT_PARENT": str(os.getpid())}
    env["COUNTERPOINT_LISTEN_FD"] = str(listener.fileno()) if rank == 0 else "0"
    return env


def _wait(workers: list[subprocess.Popen[bytes]], forward: _Forward, grace: float) -> list[int | None]:
    """Exit codes in rank order; None for a worker that had to be killed because another failed."""
    deadline = None
    while None in (codes := [process.poll() for process in workers]):
        failed = any(code not in (None, 0, *_stopped(forward)) for code in codes)
        if failed and deadline is None:
            deadline = time.monotonic() + grace
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.02)
    ends = [process.poll() for process in workers]
    _kill(workers)
    return ends


def _stopped(forward: _Forward) -> tuple[int, ...]:
    if not forward.number:
        return ()
    return (128 + forward.passed_on, -forward.passed_on, *((-signal.SIGKILL,) if forward.count > 1 else ()))


def _outcome(ends: list[int | None], forward: _Forward, reports: list[Report]) -> int:
    bad = {rank: code for rank, code in enumerate(ends) if code not in (None, 0, *_stopped(forward))}
    if not bad:
        return 128 + forward.number if forward.number and any(ends) else 0
    killed = [rank for rank, code in bad.items() if code is not None and code < 0]
    if killed:
        name = signal.Signals(-(bad[killed[0]] or 0)).name
        others = next((f" ({r.message})" for r in reports if r.secondary), "")
        hint = "; the machine may be out of memory" if name == "SIGKILL" else ""
        raise WorkerFailure(f"rank {killed[0]} was killed by {name}{hint}{others}", 1)
    first = next(iter(sorted(reports, key=lambda r: (r.secondary, r.time))), None)
    if first is None:
        rank, code = next(iter(bad.items()))
        raise WorkerFailure(f"rank {rank} exited with code {code} without saying why", 1)
    silent = [
        rank for rank, code in enumerate(ends) if code is None and rank not in {r.rank for r in reports}
    ]
    if first.secondary and silent:
        said = first.message.startswith(f"rank {silent[0]} ")
        raise WorkerFailure(
            first.message if said else f"rank {silent[0]} stopped answering ({first.message})", 1
        )
    everywhere = first.secondary or sum(r.message == first.message for r in reports) == len(ends)
    where = "" if everywhere else f"rank {first.rank}: "
    raise WorkerFailure(where + first.message, 2 if first.user else 1, first.trace)


def _reports(errors: Path) -> list[Report]:
    return [Report(**json.loads(path.read_text())) for path in sorted(errors.glob("*.json"))]


def _kill(workers: list[subprocess.Popen[bytes]]) -> None:
    for process in workers:
        if process.poll() is None:
            process.kill()
    for process in workers:
        process.wait()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
