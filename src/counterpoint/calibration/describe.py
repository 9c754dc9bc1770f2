"""From what was measured to a cluster, and to a cluster file in which every figure has its spread beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from counterpoint.calibration.measurement import Calibration, Point, Series, pooled
from counterpoint.cluster.cluster import Cluster, Level
from counterpoint.cluster.curves import Curve
from counterpoint.cluster.device import WORK_CLASSES, Device, MemoryTier
from counterpoint.cluster.dump import to_file
from counterpoint.cluster.units import format_quantity

Place = tuple[str | int | float, ...]
Comments = dict[Place, str]
LARGE = 2**20  # bytes from which a message shows bandwidth rather than latency
BUSY = 0.9  # below this share of a core, other programs were running


def describe(calibration: Calibration) -> tuple[Cluster, Comments]:
    """The cluster of the calibrated machine, and the spread of its figures by their place in the file."""
    comments: Comments = {}
    machine, ranks = calibration.machine, calibration.ranks
    devices: dict[str, Device] = {}
    kinds = (
        {"gpu": machine.accelerator_bytes} if calibration.gpus else {"core": machine.memory_bytes // ranks}
    )
    kinds["all-cores"] = machine.memory_bytes
    for name, size in kinds.items():
        slowdown = max(1.0, ranks / machine.cores) if name == "core" else 1.0
        devices[name] = _device(name, size, calibration.points(f"{name}/"), slowdown, comments)
    links = calibration.points("gpu/link/" if calibration.gpus else "link/")
    levels = []
    if ranks > 1:
        join = _gpu_level if calibration.gpus else _process_level
        levels = [join(ranks, links, calibration.points("collective/"), comments)]
    first = next(iter(devices))
    return Cluster(
        "this-machine",
        devices,
        ((first, ranks),),
        tuple(levels),
        ranks,
        about=_about(calibration),
        sources=_sources(calibration),
    ), comments


def stream_figures(calibration: Calibration) -> dict[int, dict[str, Point]]:
    """What STREAM measured: by threads, then by kernel."""
    found: dict[int, dict[str, Point]] = {}
    for name, series in calibration.points("stream/").items():
        kernel, threads = name.split("/")
        found.setdefault(int(threads), {})[kernel] = series.points[0]
    return dict(sorted(found.items()))


def core_device(size: int, series: Mapping[str, Series], slowdown: float) -> Device:
    """A single-threaded process with so many bytes of memory, by its series (launch, matmul, memory, ...)."""
    return _device("core", size, series, slowdown, {})


def process_level(ranks: int, series: Mapping[str, Series]) -> Level:
    """Processes on one machine in the middle of training, by the series of their messages."""
    return _process_level(ranks, series, {}, {}, busy=True)


def _device(
    name: str, size: int, series: Mapping[str, Series], slowdown: float, comments: Comments
) -> Device:
    """Series are named kind or kind/dtype; what has no dtype is float32. slowdown: by taking turns on a core."""
    launches = [s for kind, s in series.items() if kind.startswith("launch")]
    launch = min(s.points[0].quiet for s in launches)
    comments["devices", name, "launch"] = launches[0].points[0].spread()
    rates: dict[str, dict[str, Curve]] = {}
    memory: list[MemoryTier] = []
    for kind, s in series.items():
        kind, _, dtype = kind.partition("/")
        if kind in WORK_CLASSES:
            dtype = dtype or "float32"
            rates.setdefault(kind, {})[dtype] = s.curve(launch, slowdown)
            _note(comments, ("devices", name, "rates", kind, dtype), s)
        elif kind == "memory" and not memory:
            curve = s.curve(launch, slowdown)
            memory.append(MemoryTier("memory", size, curve.maximum, curve))
            _note(comments, ("devices", name, "memory", "memory", "attained"), s)
            comments["devices", name, "memory", "memory", "bandwidth"] = (
                "the fastest that was measured, in a cache; no data sheet was asked"
            )
        elif kind == "host":
            curve = s.curve(launch, slowdown)
            memory.append(MemoryTier("host", size, curve.maximum, curve))
            _note(comments, ("devices", name, "memory", "host", "attained"), s)
    return Device(name, {}, rates, tuple(memory), launch * slowdown)


def _process_level(
    ranks: int,
    series: Mapping[str, Series],
    collectives: Mapping[str, Series],
    comments: Comments,
    busy: bool = False,
) -> Level:
    """Processes on one machine: a message costs the same to everybody, and all share what the machine can copy.

    busy: a small message takes what it does on average, rather than on a quiet machine.
    """
    there, back = series["0-1"], series["1-0"]
    both = pooled([there, back])
    trip, step = series["latency"].points[0].quiet, series["step"].points[0]
    latency = (
        step.typical if busy else step.quiet
    ) / step.size  # with the executor's part, which the bare transport does not have
    curve = _whole_time(both, trip, latency)
    exchange = series["exchange"]
    totals = sorted(ranks * p.size / max(p.quiet - trip / 2, 0.1 * p.quiet) for p in _large(exchange))
    bandwidth = max(totals[len(totals) // 2], curve.maximum)
    place = ("levels", 0)
    comments[*place, "latency"] = f"{step.label}: a message's share; {step.spread()}"
    comments[*place, "bandwidth"] = f"all {ranks} ranks sending at once; " + _large(exchange)[-1].spread()
    _note(comments, (*place, "attained"), both)
    tables = {}
    for kind, s in collectives.items():
        tables[kind] = {ranks: s.curve()}
        _note(comments, (*place, "collectives", kind, ranks), s)
    return Level(
        "node",
        ranks,
        "bus",
        bandwidth,
        latency,
        name="gloo between processes",
        attained=curve,
        collectives=tables,
    )


def _whole_time(messages: Series, trip: float, latency: float) -> Curve:
    """Rate of messages over latency and moving together.

    messages: there, with a byte back, so that a round trip (s) is in every time; noise may hide what is left.
    """
    points = []
    for i, (point, seconds) in enumerate(zip(messages.points, messages.times(), strict=True)):
        moving = max(seconds - trip, (1 + 1e-3 * i) * 0.01 * latency)
        points.append((point.size, point.size / (latency + moving)))
    return Curve.of(points)


def _gpu_level(
    ranks: int, series: Mapping[str, Series], collectives: Mapping[str, Series], comments: Comments
) -> Level:
    """GPUs of one machine, by copies between two of them: a port per GPU, as wide as both ways at once allow."""
    one, both = series["0-1"], series["both"]
    latency = 0.9 * one.times()[0]
    curve = one.curve()
    bandwidth = max(curve.maximum, both.curve().maximum)
    comments["levels", 0, "latency"] = one.points[0].spread()
    comments["levels", 0, "bandwidth"] = "GPUs 0 and 1 to each other at once; " + both.points[-1].spread()
    _note(comments, ("levels", 0, "attained"), one)
    return Level("node", ranks, "switch", bandwidth, latency, name="copies between GPUs", attained=curve)


def _large(series: Series) -> list[Point]:
    return [p for p in series.points if p.size >= LARGE] or [series.points[-1]]


def _note(comments: Comments, place: Place, series: Series) -> None:
    for point in series.points:
        comments[*place, point.size] = f"{point.label}; {point.spread()}"


def _about(c: Calibration) -> str:
    what = f"{c.ranks} GPUs of" if c.gpus else f"{c.ranks} processes of 1 thread on"
    return f"{what} {c.machine.processor}, {c.machine.cores} cores; counterpoint calibrate, {c.date}"


def _sources(c: Calibration) -> dict[str, str]:
    how = (
        "every figure is the lower decile of its runs; beside it stands by how much the best, the median and the "
        "worst time differ from it"
    )
    measured = (
        f"{c.date} on host {c.machine.host}, torch {c.machine.torch}{', --quick' if c.quick else ''}; {how}"
    )
    sources = {"measured": measured}
    if not c.gpus:
        cores = c.machine.cores
        state = f"they had a core for {c.undisturbed:.0%} of the time"
        if c.ranks > cores:
            state = f"they take turns on {cores} cores: times are {c.ranks / cores:g} times those of a core"
        elif c.undisturbed < BUSY:
            state += ": other programs were running"
        sources["core"] = (
            f"one of {c.ranks} single-threaded processes that were measured at the same time, so that they share "
            f"caches and memory as in a run; {state}"
        )
    sources["all-cores"] = f"one process with {c.machine.cores} threads; not placed on a rank"
    sources["elementwise"] = "merging of partial attention outputs, 3 FLOP per element"
    for threads, kernels in stream_figures(c).items():
        sources[f"stream-{threads}"] = f"best on {threads} threads, float64: " + ", ".join(
            f"{k} {format_quantity(p.size / p.best, 'bytes_per_second')} ({p.spread()})"
            for k, p in kernels.items()
        )
    return sources


def plain(cluster: Cluster) -> dict[str, Any]:
    """The cluster as plain values of the file format, with six significant digits."""
    return _rounded(to_file(cluster))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {_rounded(k): _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(f"{value:.6g}")
    return value
