"""The command `counterpoint`. Commands are listed here and imported when they are used."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any


def main() -> None:
    """Entry point of the console script and of `python -m counterpoint`."""
    if sys.argv[1:] in (["--version"], ["-V"]):
        from importlib.metadata import version

        print(f"counterpoint {version('counterpoint')}")  # before typer is imported: it is half the time
        return

    from counterpoint.cli.errors import describe, fail, is_peer_failure, is_user_mistake

    worker = _worker()
    try:
        code = _run()
    except Exception as error:
        user, peer = is_user_mistake(error), is_peer_failure(error)
        if worker is not None and worker.errors is not None:
            from counterpoint.training.launch import write_report

            write_report(worker, error, user, peer)
            _exit_at_once(2 if user else 1)
        from counterpoint.training.launch import WorkerFailure

        if isinstance(error, WorkerFailure):
            sys.stderr.write(error.trace)
            fail(str(error), error.exit_code)
        if user or peer:
            where = f"rank {worker.rank}: " if worker is not None else ""
            fail(where + describe(error), 2 if user else 1)
        traceback.print_exc()
        sys.exit(1)
    sys.exit(code)


def _worker():
    """This process as a worker of a run, tied to the parent that started it; None in any other process."""
    if "RANK" not in os.environ:
        return None
    import signal

    from counterpoint.cli.errors import fail
    from counterpoint.training.launch import die_with_parent, worker_from

    try:
        worker = worker_from(os.environ)
    except ValueError as error:
        fail(str(error), 2)
    if worker is not None and worker.parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the trainer takes over, end without a traceback
        die_with_parent(worker.parent)
    return worker


def _exit_at_once(code: int) -> None:
    # not through the interpreter's shutdown: communication threads may wait there for a peer that is gone
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run() -> int:
    import typer

    from counterpoint.cli.app import app

    usage_error: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    try:
        return app(prog_name="counterpoint", standalone_mode=False) or 0
    except usage_error as error:
        message = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
        if not message:  # no command was given, and the help has been shown
            return 2
        raise ValueError(f"{message} (see counterpoint --help)") from None
    except typer.Abort:
        return 130
