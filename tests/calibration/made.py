"""A calibration made from known costs, to see what becomes of it."""

from __future__ import annotations

from counterpoint.calibration.compute import HEAD_DIM, HEADS
from counterpoint.calibration.measurement import Calibration, Machine, Point, Series

LAUNCH = 2e-6  # seconds
FLOPS = 50e9  # per second
MEMORY = 10e9  # bytes per second
LATENCY = 100e-6  # seconds
FLOW = 2e9  # bytes per second of one message
TOGETHER = 3e9  # bytes per second of all messages
RUNS = (1.0, 1.0, 1.1, 1.5)  # times of the runs of a point, relative to the quickest
MACHINE = Machine("a processor", 2, 16 * 2**30, 2**20, (), 0, "2.13.0", "here")


def point(size: float, seconds: float) -> Point:
    return Point.of(size, f"size {size:g}", [seconds * r for r in RUNS])


def series(unit, sizes, cost) -> Series:
    return Series(unit, tuple(point(n, cost(n)) for n in sizes))


def calibration(ranks: int = 2) -> Calibration:
    """Of `ranks` ranks, with the constants above."""
    found: dict[str, Series] = {}
    pairs = HEADS * HEAD_DIM
    for device in ("core", "all-cores"):
        found[f"{device}/launch"] = Series("seconds", (point(1, LAUNCH),))
        for kind, sizes in (
            ("matmul", [2 * n**3 for n in (64, 256, 1024)]),
            ("attention_forward", [4 * t * t * pairs for t in (64, 256, 1024)]),
            ("attention_backward", [10 * t * t * pairs for t in (64, 256, 1024)]),
            ("elementwise", [3 * t * pairs for t in (64, 256, 1024)]),
        ):
            found[f"{device}/{kind}"] = series("flops", sizes, lambda n: LAUNCH + n / FLOPS)
        found[f"{device}/memory"] = series("bytes", [2**16, 2**20, 2**26], lambda n: LAUNCH + n / MEMORY)
    for kernel, words in (("copy", 2), ("scale", 2), ("add", 3), ("triad", 3)):
        found[f"stream/{kernel}/1"] = series("bytes", [words * 8 * 2**20], lambda n: n / MEMORY)
    if ranks > 1:
        sizes = [2**10, 2**15, 2**20, 2**25]
        found["link/latency"] = Series("bytes", (point(1, 2 * LATENCY),))
        found["link/step"] = Series("bytes", (point(8, 8 * LATENCY),))
        for way in ("0-1", "1-0"):  # the answer takes a latency too
            found[f"link/{way}"] = series("bytes", sizes, lambda n: 2 * LATENCY + n / FLOW)
        found["link/exchange"] = series("bytes", sizes, lambda n: LATENCY + ranks * n / TOGETHER)
        found["collective/all_gather"] = series("bytes", sizes, lambda n: LATENCY + n / FLOW)
    return Calibration(MACHINE, "2026-11-22T10:00:00+00:00", ranks, False, True, 0.98, found)
