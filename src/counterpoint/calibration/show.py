"""Tables of what was measured, for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from counterpoint.calibration.describe import BUSY, stream_figures
from counterpoint.calibration.measurement import Calibration, Point, Series, Unit
from counterpoint.cluster.cluster import Cluster
from counterpoint.cluster.units import Dimension, format_quantity

_TITLES = {
    "matmul": "matmul",
    "attention_forward": "attention forward",
    "attention_backward": "attention backward",
    "elementwise": "merge",
    "memory": "triad",
}


_COLUMNS = ("what", "smallest", "half way", "largest", "spread")


def show(calibration: Calibration, cluster: Cluster, console: Console) -> None:
    """Print the figures at the largest sizes with their spread."""
    console.print(_stream_table(calibration))
    console.print(_rates_table(calibration))
    if cluster.levels:
        console.print(_links_table(calibration, cluster))
    if (
        not calibration.gpus
        and calibration.ranks <= calibration.machine.cores
        and calibration.undisturbed < BUSY
    ):
        console.print(
            f"[yellow]other programs were running: ranks had a core for only {calibration.undisturbed:.0%} of the "
            "time, so rates may be low; calibrate again with --refresh when the machine is idle"
        )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def _stream_table(calibration: Calibration) -> Table:
    table = _table(
        "Memory bandwidth, as STREAM (best; float64)",
        "threads",
        "copy",
        "scale",
        "add",
        "triad",
        "spread of triad",
    )
    for threads, kernels in stream_figures(calibration).items():
        best = [format_quantity(p.size / p.best, "bytes_per_second") for p in kernels.values()]
        table.add_row(str(threads), *best, _spread(kernels["triad"]))
    return table


def _rates_table(calibration: Calibration) -> Table:
    table = _table("Rates", *_COLUMNS)
    for device in ("gpu", "core", "all-cores"):
        for name, series in calibration.points(f"{device}/").items():
            kind, _, dtype = name.partition("/")
            if kind in _TITLES:
                table.add_row(f"{device}: {_TITLES[kind]} {dtype}".strip(), *_row(series))
            elif kind == "launch":
                point = series.points[0]
                launch = format_quantity(point.quiet, "seconds")
                table.add_row(f"{device}: launch", launch, "", "", _spread(point))
    return table


def _links_table(calibration: Calibration, cluster: Cluster) -> Table:
    table = _table("Messages and collectives", *_COLUMNS)
    table.add_row("latency", format_quantity(cluster.levels[0].latency_seconds, "seconds"))
    titles = {"0-1": "0 to 1", "1-0": "1 to 0", "exchange": "all ranks at once, each", "both": "both ways"}
    series = calibration.points("gpu/link/" if calibration.gpus else "link/")
    rows = {titles[name]: s for name, s in series.items() if name in titles}
    rows |= {name.replace("_", "-"): s for name, s in calibration.points("collective/").items()}
    for title, s in rows.items():
        table.add_row(title, *_row(s))
    return table


def _row(series: Series) -> tuple[str, ...]:
    points = series.points
    cells = [_rate(series.unit, p) for p in (points[0], points[len(points) // 2], points[-1])]
    return (*cells, _spread(points[-1]))


def _rate(unit: Unit, point: Point) -> str:
    per_second: Dimension = "flops_per_second" if unit == "flops" else "bytes_per_second"
    of: Dimension = "flops" if unit == "flops" else "bytes"
    size = format_quantity(point.size, of).removesuffix("FLOP").strip()
    return f"{format_quantity(point.size / point.quiet, per_second).replace('FLOP/s', 'F/s')} @ {size}"


def _spread(point: Point) -> str:
    """Best and median time against the figure: the worst says more of the machine's other work."""
    return f"{point.best / point.quiet - 1:+.0%} to {point.median / point.quiet - 1:+.0%}"
