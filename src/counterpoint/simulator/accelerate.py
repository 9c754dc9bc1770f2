"""Compiles the inner loops with numba where it is installed; without it they run, slower, as they are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

try:
    import numba
except ImportError:
    numba = None

ACCELERATED = numba is not None


def compiled(function: F) -> F:
    """A function of numpy arrays and numbers, compiled when it is first called and kept on disk for later processes."""
    return function if numba is None else numba.njit(cache=True, error_model="numpy")(function)
