"""Processes that compute while the caller does something else, and that can be ended when they take too long.

A worker is `python -m counterpoint.planner.worker` on two pipes: it needs neither fork (torch and gloo threads do not
survive one) nor the caller's main module, and it ends by itself when the caller is gone, however that ended.
"""

from __future__ import annotations

import os
import pickle
import select
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any


class WorkerError(RuntimeError):
    """A task failed in a worker, or the worker died; one line."""


@dataclass
class Worker:
    """One process that does one task at a time."""

    process: subprocess.Popen | None = None
    busy: bool = False
    deadline: float = float("inf")
    _buffer: bytearray = field(default_factory=bytearray)

    def begin(self, function: Callable[..., Any], arguments: tuple, seconds: float) -> None:
        """Start a task; `done` will say that it took too long after `seconds`."""
        if self.process is None or self.process.poll() is not None:
            self.end()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "counterpoint.planner.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C reaches the caller alone, which closes its pipes
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        assert self.process.stdin is not None
        self.busy, self.deadline = True, time.monotonic() + seconds
        self._buffer.clear()
        with suppress(OSError):  # it died: `done` reports that
            write_frame(self.process.stdin, (function, arguments))

    def done(self, wait: float) -> tuple[bool, Any]:
        """(whether there is a result, the result). Raises WorkerError, or TimeoutError after the deadline."""
        assert self.busy and self.process is not None and self.process.stdout is not None
        until = min(time.monotonic() + wait, self.deadline)
        while True:
            left = max(0.0, until - time.monotonic())
            ready, _, _ = select.select([self.process.stdout], [], [], left)
            if not ready:
                if time.monotonic() >= self.deadline:
                    self.end()
                    raise TimeoutError("a worker took longer than its limit and was ended")
                return False, None
            part = os.read(self.process.stdout.fileno(), 1 << 20)
            if not part:
                code = self.process.wait()
                self.end()
                raise WorkerError(f"a planning process died with exit code {code}")
            self._buffer += part
            if len(self._buffer) >= 8:
                (size,) = struct.unpack_from("<Q", self._buffer)
                if len(self._buffer) >= 8 + size:
                    ok, value = pickle.loads(bytes(self._buffer[8 : 8 + size]))
                    self.busy = False
                    if ok:
                        return True, value
                    raise value

    def end(self) -> None:
        """End the process, whatever it does."""
        self.busy = False
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
            self.process = None


def write_frame(pipe: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value)
    pipe.write(struct.pack("<Q", len(data)) + data)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> Any:
    """The next value, or EOFError when the other end is gone."""
    head = pipe.read(8)
    if len(head) < 8:
        raise EOFError
    (size,) = struct.unpack("<Q", head)
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)


def run_all(
    tasks: list[tuple[Callable[..., Any], tuple]], workers: int, seconds: float
) -> list[tuple[Any, Exception | None]]:
    """(result, error) of every task in order, by that many processes, each task within `seconds`."""
    found: list[tuple[Any, Exception | None]] = [(None, None)] * len(tasks)
    pool = [Worker() for _ in range(min(workers, len(tasks)))]
    at: dict[int, int] = {}
    try:
        left = list(range(len(tasks)))[::-1]
        while left or at:
            for w, worker in enumerate(pool):
                if w not in at and left:
                    at[w] = left.pop()
                    worker.begin(*tasks[at[w]], seconds)
            for w in list(at):
                try:
                    ready, value = pool[w].done(0.02)
                    if not ready:
                        continue
                    found[at[w]] = value, None
                except (TimeoutError, WorkerError, ValueError) as error:
                    found[at[w]] = None, error
                del at[w]
    finally:
        for worker in pool:
            worker.end()
    return found
