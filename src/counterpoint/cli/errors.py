"""What a user sees when something goes wrong: one line and exit code 2 for a mistake, else a traceback."""

from __future__ import annotations

import errno
import sys
from typing import NoReturn


def is_user_mistake(error: BaseException) -> bool:
    """Whether the error is about what was given (values, files, a full disk, a learning rate that diverges)."""
    return isinstance(error, ValueError | OSError | FloatingPointError) and not isinstance(
        error, ConnectionError | UnicodeError
    )


def is_peer_failure(error: BaseException) -> bool:
    """Whether another worker failed first."""
    # by name: importing the class would import torch
    return any(kind.__name__ == "PeerFailure" for kind in type(error).__mro__)


def describe(error: BaseException) -> str:
    """The error as one line."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        hint = "; make room or choose another directory" if error.errno == errno.ENOSPC else ""
        return f"{where}{error.strerror.lower()}{hint}"
    return " ".join(str(error).split()) or type(error).__name__


def fail(message: str, code: int) -> NoReturn:
    """Ends the process with one line on standard error."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
