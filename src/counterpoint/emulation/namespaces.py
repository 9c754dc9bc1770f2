"""Linux network namespaces that nobody else can see: they have no name and live as long as this process holds them.

A namespace is a file descriptor. When the process ends, however it ends, the kernel closes the descriptor and takes
down the namespace with every link, address and queue in it; a killed run leaves nothing to clean up.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from shutil import which
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_COMMAND_SECONDS = 60.0


class Unsupported(ValueError):
    """This machine cannot make namespaces or rate-limited links; the message says what is missing."""


class Namespaces:
    """A number of network namespaces, gone after `close`. They can reach neither each other nor anything else.

    Raises Unsupported where the system or the rights do not allow it.
    """

    def __init__(self, count: int) -> None:
        self.descriptors: list[int] = []
        _check_system()
        try:
            for _ in range(count):
                self.descriptors.append(_aside(_create))
        except BaseException:
            self.close()
            raise

    def path(self, index: int) -> str:
        """A file through which this process and its children find a namespace."""
        return f"/proc/{os.getpid()}/fd/{self.descriptors[index]}"

    def batch(self, index: int, tool: str, lines: Sequence[str]) -> None:
        """Run commands of `ip` or `tc` in a namespace. Raises Unsupported with the first that fails."""
        if lines:
            self.inside(index, lambda: _batch(tool, lines))

    def settings(self, index: int, values: dict[str, str]) -> None:
        """Set kernel parameters (paths below /proc/sys/net) of a namespace."""

        def write() -> None:
            for name, value in values.items():
                path = f"/proc/sys/net/{name}"
                try:
                    Path(path).write_text(value)
                except OSError as error:
                    raise Unsupported(
                        f"the scale model must set {path}, which this system does not allow ({error.strerror}); run "
                        "it with CAP_NET_ADMIN where /proc/sys is writable (sudo; in a container: privileged)"
                    ) from None

        self.inside(index, write)

    def inside(self, index: int, function: Callable[[], T]) -> T:
        """Call a function in a namespace; what it starts lives there too, this thread stays where it is."""

        def enter_and_call() -> T:
            enter(self.path(index))
            return function()

        return _aside(enter_and_call)

    def close(self) -> None:
        while self.descriptors:
            with suppress(OSError):
                os.close(self.descriptors.pop())

    def __enter__(self) -> Namespaces:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def enter(path: str) -> None:
    """Move the calling thread, and the threads and processes that it starts from now on, into a namespace."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("setns", descriptor, _CLONE_NEWNET)
    finally:
        os.close(descriptor)


def _create() -> int:
    try:
        _call("unshare", _CLONE_NEWNET)
    except PermissionError:
        raise Unsupported(
            "the scale model makes network namespaces, which needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN); "
            "run it with sudo, or in a privileged container"
        ) from None
    except OSError as error:
        raise Unsupported(f"this kernel has no network namespaces ({error.strerror})") from None
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _check_system() -> None:
    if platform.system() != "Linux":
        raise Unsupported(
            f"the scale model needs Linux network namespaces; this is {platform.system()}: use counterpoint "
            "simulate here, or a Linux machine"
        )
    for tool in ("ip", "tc"):
        if which(tool) is None:
            raise Unsupported(f"the command {tool} is missing; install the package iproute2 (iproute-tc)")


def _batch(tool: str, lines: Sequence[str]) -> None:
    done = subprocess.run(
        [tool, "-batch", "-"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=_COMMAND_SECONDS,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "Warning" not in line]
        number = next(
            (int(s.rsplit("-:", 1)[1]) for s in said if "-:" in s and s.rsplit("-:", 1)[1].isdecimal()), 0
        )
        failed = f" at '{tool} {lines[number - 1]}'" if number else ""
        why = said[0] if said else f"exit code {done.returncode}"
        raise Unsupported(
            f"this kernel lacks what the scale model needs{failed}: {why} "
            "(veth, policy routing and the htb queueing discipline must be there)"
        )


def _call(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _aside(function: Callable[[], T]) -> T:
    """Call a function in a thread of its own: a namespace belongs to a thread, and this one keeps its own."""
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
