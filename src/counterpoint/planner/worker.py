"""A planning process: tasks come on standard input, results go to standard output. Ends with the one who started it."""

from __future__ import annotations

import os
import queue
import sys
import threading
from typing import Any

from counterpoint.planner.workers import WorkerError, read_frame, write_frame


def main() -> None:
    tasks: queue.Queue[Any] = queue.Queue()
    inbox, outbox = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints goes to standard error, not between the results

    def listen() -> None:
        try:
            while True:
                tasks.put(read_frame(inbox))
        except (EOFError, OSError):
            os._exit(0)  # the caller is gone; a solver may be in the middle of something

    threading.Thread(target=listen, daemon=True).start()
    while True:
        function, arguments = tasks.get()
        try:
            answer = (True, function(*arguments))
        except ValueError as error:
            answer = (False, ValueError(" ".join(str(error).split())))
        except Exception as error:
            text = " ".join(str(error).split())
            answer = (False, WorkerError(f"{type(error).__name__}: {text}"))
        try:
            write_frame(outbox, answer)
        except OSError:
            os._exit(0)


if __name__ == "__main__":
    main()
