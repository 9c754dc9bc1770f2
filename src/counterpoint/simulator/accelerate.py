"""The event loop compiled with numba, where that is installed."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def accelerated() -> Callable[..., None] | None:
    """The event loop as machine code, kept on disk for later processes; None without numba.

    Compiling takes some twenty seconds, the first time; see `compiled_before`.
    """
    try:
        from numba import njit
        from numba.extending import register_jitable
    except ImportError:
        return None
    from counterpoint.simulator import engine, events, network

    sources = "".join(inspect.getsource(module) for module in (events, network, engine))
    # Nothing allocates memory: counting references to the arrays would take most of the time.
    unmanaged = register_jitable(_nrt=False)
    stamp = hashlib.sha256(sources.encode()).hexdigest()
    for module in (events, network, engine):
        for function in vars(module).values():
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                unmanaged(function)
    loop = engine.loop

    def run(program, state, flows, events, width):
        _ = stamp  # numba looks for changes in one file only; what the closure holds is part of the key on disk
        loop(program, state, flows, events, width)

    return njit(cache=True, error_model="numpy", _nrt=False)(run)  # type: ignore[call-overload]


def compiled_before(fast: Callable[..., None]) -> bool:
    """Whether an earlier process has left machine code on disk."""
    folder = Path(fast._cache.cache_path)  # type: ignore[attr-defined]
    return any(folder.glob("accelerate.*.nbi"))
