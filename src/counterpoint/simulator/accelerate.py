"""The event loop compiled with numba, where that is installed."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import lru_cache


@lru_cache(maxsize=1)
def accelerated() -> Callable[..., None] | None:
    """The event loop as machine code, kept on disk for later processes; None without numba.

    Compiling takes some ten seconds, the first time.
    """
    try:
        from numba import njit
        from numba.extending import register_jitable
    except ImportError:
        return None
    from counterpoint.simulator import engine, network

    sources = "".join(inspect.getsource(module) for module in (network, engine))
    stamp = hashlib.sha256(sources.encode()).hexdigest()
    for module in (network, engine):
        for function in vars(module).values():
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                register_jitable(function)
    loop = engine.loop

    def run(program, state, flows, width):
        _ = stamp  # numba looks for changes in one file only; what the closure holds is part of the key on disk
        loop(program, state, flows, width)

    return njit(cache=True, error_model="numpy")(run)
