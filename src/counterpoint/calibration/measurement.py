"""What a calibration measured: every time that was taken, by what it was taken of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from counterpoint.cluster.curves import Curve

Unit = Literal["flops", "bytes", "seconds"]
KEPT = 40  # times that are stored of one point


@dataclass(frozen=True, slots=True)
class Point:
    """Times (s, sorted) of one thing repeated; `size` is its FLOPs or bytes, `label` says what it was."""

    size: float
    label: str
    seconds: tuple[float, ...]

    @classmethod
    def of(cls, size: float, label: str, seconds: Iterable[float]) -> Point:
        times = sorted(seconds)
        if len(times) > KEPT:  # evenly over the ranks of the order, both ends included
            times = [times[round(i * (len(times) - 1) / (KEPT - 1))] for i in range(KEPT)]
        assert times and times[0] > 0, f"{label}: no time was taken"
        return cls(float(size), label, tuple(times))

    def quantile(self, share: float) -> float:
        return self.seconds[round(share * (len(self.seconds) - 1))]

    @property
    def quiet(self) -> float:
        """The lower decile: the time on a quiet machine, unless other programs disturbed nine runs in ten."""
        return self.quantile(0.1)

    @property
    def best(self) -> float:
        return self.seconds[0]

    @property
    def typical(self) -> float:
        """The mean of the middle half: what it takes with the usual disturbance, without rare ones."""
        quarter = len(self.seconds) // 4
        middle = self.seconds[quarter : len(self.seconds) - quarter]
        return sum(middle) / len(middle)

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    def spread(self) -> str:
        """The number of runs, and by how much (%) the best, the median and the worst time differ from `quiet`."""
        best, median, worst = ((t / self.quiet - 1) * 100 for t in (self.best, self.median, self.seconds[-1]))
        return f"{len(self.seconds)} runs, {best:+.0f} {median:+.0f} {worst:+.0f} %"


@dataclass(frozen=True, slots=True)
class Series:
    """One quantity over its size."""

    unit: Unit
    points: tuple[Point, ...]

    def times(self) -> list[float]:
        """Time (s) of every point on a quiet machine, never falling with the size.

        Disturbance only ever adds time, so a size that took longer than a larger one is corrected, not the other.
        """
        found: list[float] = []
        for point in reversed(self.points):
            # strictly smaller, so that rounding in a file does not turn the order around
            found.append(min([point.quiet, *(t * 0.9999 for t in found[-1:])]))
        return found[::-1]

    def curve(self, overhead: float = 0.0, slowdown: float = 1.0) -> Curve:
        """Rate over size, once a fixed time (s) is taken out of every point; all of it `slowdown` times slower."""
        times = [slowdown * max(t - overhead, 0.1 * t) for t in self.times()]
        return Curve.of((p.size, p.size / t) for p, t in zip(self.points, times, strict=True))


def pooled(series: Sequence[Series]) -> Series:
    """The same series measured several times, or on several ranks, as one that has the times of all."""
    rows = zip(*(s.points for s in series), strict=True)
    return Series(
        series[0].unit,
        tuple(Point.of(row[0].size, row[0].label, [t for p in row for t in p.seconds]) for row in rows),
    )


@dataclass(frozen=True, slots=True)
class Machine:
    """What tells one machine from another, as far as its speed goes."""

    processor: str
    cores: int
    memory_bytes: int
    cache_bytes: int
    accelerators: tuple[str, ...]
    accelerator_bytes: int
    torch: str
    host: str


@dataclass(frozen=True, slots=True)
class Calibration:
    """Everything that was measured of a machine. `series` are named by place and kind: core/matmul, link/0-1.

    `ranks` are GPUs where `gpus` says so, else single-threaded processes.
    `undisturbed` is the share of the time in which single-threaded work had a core for itself; below 1, other
    programs were running.
    """

    machine: Machine
    date: str
    ranks: int
    gpus: bool
    quick: bool
    undisturbed: float
    series: Mapping[str, Series]

    def points(self, prefix: str) -> dict[str, Series]:
        """The series whose names start with a prefix, by the rest of the name."""
        return {name[len(prefix) :]: s for name, s in self.series.items() if name.startswith(prefix)}

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Raises ValueError, KeyError or TypeError when the text is not what `to_json` wrote."""
        data = json.loads(text)
        machine = machine_from(data.pop("machine"))
        return cls(machine=machine, series=series_from(data.pop("series")), **data)


def machine_from(data: Mapping[str, Any]) -> Machine:
    """A machine from the plain values that JSON keeps."""
    machine = Machine(**data)
    return replace(machine, accelerators=tuple(machine.accelerators))


def series_from(data: Mapping[str, Any]) -> dict[str, Series]:
    """Series by name, from the plain values that JSON keeps."""
    return {
        name: Series(s["unit"], tuple(Point(p["size"], p["label"], tuple(p["seconds"])) for p in s["points"]))
        for name, s in data.items()
    }
