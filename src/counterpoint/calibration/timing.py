"""How times are taken: warm-up, enough repeats for the clock, many samples within a budget of seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from counterpoint.calibration.measurement import Point

TICKS = 1e-4  # seconds that one sample lasts at least: clock and call cost little of it
LEAST = 5  # samples of one point

Advance = Callable[[str], None]  # told what comes next; how progress is shown


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to measure: seconds per point, sizes per series, rounds of STREAM."""

    seconds: float
    sizes: int

    repeats: int  # of STREAM

    @classmethod
    def of(cls, quick: bool) -> Effort:
        return cls(0.15, 6, 10) if quick else cls(1.0, 8, 40)


@dataclass(slots=True)
class Share:
    """How much of the time a single-threaded process was given a core."""

    wall: float = 0.0
    core: float = 0.0

    @property
    def value(self) -> float:
        return min(1.0, self.core / self.wall) if self.wall else 1.0


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """How one run is timed. wait: for devices that run behind the program.

    own: seconds of the core that ran this thread rather than of the wall, so that other programs on a busy machine do
    not count; for single-threaded work on a core of its own the two are the same. share: kept up to date.
    """

    wait: Callable[[], None] | None = None
    own: bool = False
    share: Share | None = None

    def __call__(self, run: Callable[[], object], repeats: int = 1) -> tuple[float, float]:
        """(seconds of one of `repeats` runs, seconds that passed meanwhile)."""
        if self.wait is not None:
            self.wait()
        wall, core = time.perf_counter(), time.thread_time()
        for _ in range(repeats):
            run()
        if self.wait is not None:
            self.wait()
        wall, core = time.perf_counter() - wall, time.thread_time() - core
        if self.share is not None:
            self.share.wall += wall
            self.share.core += core
        return max(core if self.own else wall, 1e-9) / repeats, wall


def sample(
    run: Callable[[], object], size: float, label: str, effort: Effort, stopwatch: Stopwatch | None = None
) -> Point:
    """Times of `run()`, at least LEAST and until the budget is used up; fewer where one takes longer than that."""
    stopwatch = stopwatch or Stopwatch()
    run()
    one, passed = stopwatch(run)
    repeats = 1
    times = [one]
    if one < TICKS:
        one = min(stopwatch(run, 10)[0] for _ in range(2))
        repeats, times, passed = max(1, math.ceil(TICKS / one)), [], 0.0
    while passed < effort.seconds or (len(times) < LEAST and passed < 4 * effort.seconds):
        took, wall = stopwatch(run, repeats)
        times.append(took)
        passed += wall
    return Point.of(size, label, times)


def spaced(low: int, high: int, count: int) -> list[int]:
    """About `count` powers of two from `low` to `high` (powers of two), both included."""
    steps = int(math.log2(high // low))
    return sorted({low << round(i * steps / (count - 1)) for i in range(count)})
