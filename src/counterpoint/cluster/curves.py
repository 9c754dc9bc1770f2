"""A rate as a function of size: what a link attains for a message, or a device for a kernel.

One constant efficiency is wrong by an order of magnitude for small messages and kernels, so every attained
rate in a cluster is a curve; a curve of one point is the constant for which nothing better is known.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise


@dataclass(frozen=True)
class Curve:
    """Measured points (size, rate), read between the points on logarithmic axes.

    Below the first point the first segment's slope goes on, but never steeper than "time stays constant"
    and never rising towards small sizes; above the last point the rate stays. So seconds(size) never falls
    when the size grows, provided the points themselves do not (`falling_time` names the first that does).
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def constant(cls, rate: float) -> Curve:
        return cls(((1.0, rate),))

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> Curve:
        return cls(tuple(sorted((float(size), float(rate)) for size, rate in points)))

    @property
    def is_constant(self) -> bool:
        return len(self.points) == 1

    @cached_property
    def maximum(self) -> float:
        return max(rate for _, rate in self.points)

    def at(self, size: float) -> float:
        """Rate (units per second) for `size` units."""
        points, size = self.points, max(size, 1.0)
        if len(points) == 1 or size >= points[-1][0]:
            return points[-1][1]
        right = max(1, bisect_right(points, size, key=lambda point: point[0]))
        (x0, y0), (x1, y1) = points[right - 1], points[right]
        slope = math.log(y1 / y0) / math.log(x1 / x0)
        if size < x0:
            slope = min(1.0, max(0.0, slope))
        return y0 * (size / x0) ** slope

    def seconds(self, size: float) -> float:
        """Time (s) for `size` units at the rate that this size attains."""
        return size / self.at(size) if size > 0 else 0.0

    def falling_time(self) -> tuple[float, float] | None:
        """The first two neighbouring sizes of which the larger takes less time, or None."""
        for (x0, y0), (x1, y1) in pairwise(self.points):
            if x1 / y1 < x0 / y0 * (1 - 1e-9):
                return x0, x1
        return None

    def without(self, latency_seconds: float) -> Curve:
        """The rate that is left once a fixed latency (s) is taken out of every point's time.

        A benchmark reports bytes over the whole time; a flow simulator adds the latency itself.

        Raises:
            ValueError: a point takes no longer than the latency alone.
        """
        points = []
        for size, rate in self.points:
            moving = size / rate - latency_seconds
            if self.is_constant:
                return self
            if moving <= 0:
                raise ValueError(
                    f"{size:.0f} bytes at {rate:.4g} bytes/s take {size / rate:.3g} s, no longer than the "
                    f"latency of {latency_seconds:.3g} s; lower the latency or correct this point"
                )
            points.append((size, size / moving))
        return Curve(tuple(points))
