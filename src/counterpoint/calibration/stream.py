"""Memory bandwidth in the manner of STREAM (McCalpin): copy, scale, add, triad over arrays that no cache holds.

As in STREAM: every array is at least four times the last-level cache; pages are touched first by the threads that
use them; the first iteration is dropped and the best of the others is the result; bytes are those the program
names, 2 or 3 words per element (writing also reads the line first, which is not counted); and the arrays must end
up with the values that the scalar recurrences give.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from counterpoint.calibration.measurement import Point, Series

Q = 3.0
WORDS = {"copy": 2, "scale": 2, "add": 3, "triad": 3}  # per element, read and written
START = (1.0, 2.0, 0.0)


def stream(threads: int, array_bytes: int, repeats: int) -> dict[str, Series]:
    """Times of the four kernels in float64 on `threads` threads, one point each; `repeats` does not count the first.

    Raises:
        RuntimeError: the arrays hold wrong values afterwards.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _stream(array_bytes, repeats)
    finally:
        torch.set_num_threads(before)


def _stream(array_bytes: int, repeats: int) -> dict[str, Series]:
    elements = max(1, array_bytes // 8)
    # filled in parallel by the same static split of the index range as the kernels: first touch
    a, b, c = (torch.empty(elements, dtype=torch.float64).fill_(x) for x in START)
    times: dict[str, list[float]] = {name: [] for name in WORDS}
    for i in range(repeats + 1):
        for name in WORDS:
            began = time.perf_counter()
            kernel(name, a, b, c)
            took = time.perf_counter() - began
            if i:
                times[name].append(took)
    check_result((a, b, c), repeats + 1)
    label = f"arrays of {array_bytes / 2**20:.0f} MiB"
    return {
        name: Series("bytes", (Point.of(WORDS[name] * elements * 8, label, times[name]),)) for name in WORDS
    }


def kernel(name: str, a: Tensor, b: Tensor, c: Tensor) -> None:
    """One pass of one of the four; none of these forms allocates."""
    if name == "copy":
        c.copy_(a)
    elif name == "scale":
        torch.mul(c, Q, out=b)
    elif name == "add":
        torch.add(a, b, out=c)
    else:
        torch.add(b, c, alpha=Q, out=a)


def check_result(arrays: tuple[Tensor, Tensor, Tensor], iterations: int) -> None:
    """Raises RuntimeError unless the arrays hold what `iterations` rounds give, as mean error below 1e-13."""
    a, b, c = START
    for _ in range(iterations):
        c = a
        b = Q * c
        c = a + b
        a = b + Q * c
    for name, array, value in zip("abc", arrays, (a, b, c), strict=True):
        error = float((array - value).abs_().mean() / abs(value))
        if not error < 1e-13:
            raise RuntimeError(
                f"STREAM array {name} is off by {error:.1e} relative: the memory or the processor is faulty"
            )
