"""A cluster as text for the terminal: levels as a tree, devices, and the bandwidth between ranks."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from counterpoint.cluster.cluster import Cluster, Level
from counterpoint.cluster.device import Device
from counterpoint.cluster.presets import find_cluster, preset_names
from counterpoint.cluster.units import format_quantity

MATRIX_RANKS = 16
MESSAGE = 64 * 2**20


def show(name_or_path: str | Path, console: Console) -> Cluster:
    """Print a preset or a cluster file, and return it.

    Raises:
        ValueError: neither a preset nor a file, or a mistake in the file (one line).
    """
    cluster = find_cluster(name_or_path)
    console.print(f"[bold]{escape(cluster.name)}[/bold]  {escape(cluster.about)}", highlight=False)
    console.print(_tree(cluster))
    console.print(_devices(cluster))
    if cluster.levels:
        console.print(_levels(cluster))
    if cluster.world_size > 1:
        console.print(_matrix(cluster, console.width))
    for name, text in cluster.sources.items():
        console.print(f"[dim]{escape(name)}: {escape(text.strip())}[/dim]", highlight=False)
    return cluster


def list_clusters(console: Console) -> None:
    """Print the presets, one a line."""
    table = Table(box=None, pad_edge=False)
    for column in ("name", "ranks", "levels", "about"):
        table.add_column(column, justify="right" if column == "ranks" else "left")
    for name in preset_names():
        cluster = find_cluster(name)
        levels = ", ".join(dict.fromkeys(level.level for level in cluster.levels))
        table.add_row(escape(name), f"{cluster.world_size:,}", levels, escape(cluster.about))
    console.print(table)


def describe_link(level: Level) -> str:
    """One line on how a level joins its children, for captions."""
    rate = format_quantity(level.bytes_per_second, "bytes_per_second")
    if level.link == "switch":
        ports = f"{level.ports} ports" if level.ports > 1 else "a port"
        back = level.receives
        ways = (
            "each way"
            if back == level.bytes_per_second
            else f"out, {format_quantity(back, 'bytes_per_second')} in"
        )
        text = f"{ports} of {rate} {ways}"
    elif level.link == "mesh":
        text = f"a link per pair, {rate} each way"
    elif level.link == "bus":
        text = f"one medium, {rate} in all"
    else:
        slow = min(link.bytes_per_second for link in level.links)
        text = (
            f"{len(level.links)} directed links, {_range(slow, max(k.bytes_per_second for k in level.links))}"
        )
    if level.oversubscription and level.oversubscription > 1:
        text += f", {level.oversubscription:g}:1 oversubscribed"
    return text


def _range(low: float, high: float) -> str:
    if low == high:
        return format_quantity(high, "bytes_per_second")
    return f"{format_quantity(low, 'bytes_per_second')} to {format_quantity(high, 'bytes_per_second')}"


def children(cluster: Cluster, tier: int) -> str:
    """'8 devices', '32 nodes': what a group of the level holds."""
    count = cluster.levels[tier].count
    inside = cluster.levels[tier - 1] if tier else None
    if inside is None:
        noun = "device"
    elif inside.level != cluster.levels[tier].level:
        noun = inside.level
    else:
        noun = "group"
    return f"{count} {noun}{'s' if count > 1 else ''}"


def _tree(cluster: Cluster) -> Tree:
    root = branch = Tree(f"{cluster.world_size:,} rank{'s' if cluster.world_size > 1 else ''}")
    for tier in range(len(cluster.levels) - 1, -1, -1):
        level = cluster.levels[tier]
        name = f" [cyan]{escape(level.name)}[/cyan]" if level.name else ""
        branch = branch.add(
            f"[bold]{level.level}[/bold]{name}: {children(cluster, tier)}, {level.link}, "
            f"{describe_link(level)}, {format_quantity(level.latency_seconds, 'seconds')}"
        )
    start = 0
    for name, count in cluster.placement:
        last = start + count - 1
        ranks = f"rank {start}" if count == 1 else f"ranks {start} to {last:,}"
        branch.add(f"{ranks}: [green]{escape(name)}[/green]")
        start += count
    return root


def _devices(cluster: Cluster) -> Table:
    table = Table(title="Devices: attained for large kernels (share of peak)", title_justify="left")
    for column in ("device", "dtype", "peak", "matmul", "attention fwd", "attention bwd"):
        table.add_column(column, justify="left" if column in ("device", "dtype") else "right")
    for device in cluster.devices.values():
        dtypes = [d for d in ("bfloat16", "float32") if any(d in rates for rates in device.rates.values())]
        dtypes = dtypes or sorted({d for rates in device.rates.values() for d in rates})[:2]
        for row, dtype in enumerate(dtypes):
            peak = device.peak_flops_per_second.get(dtype)
            cells = [
                _rate(device, work, dtype, peak)
                for work in ("matmul", "attention_forward", "attention_backward")
            ]
            shown = format_quantity(peak, "flops_per_second") if peak else "-"
            table.add_row(escape(device.name) if row == 0 else "", dtype, shown, *cells)
        tiers = [
            f"{tier.name} {format_quantity(tier.size_bytes, 'bytes')}, "
            f"{format_quantity(tier.attained.maximum, 'bytes_per_second')}"
            for tier in device.memory
        ]
        launch = f"launch {format_quantity(device.launch_seconds, 'seconds')}"
        table.add_section()
        table.caption = "; ".join(
            filter(None, [str(table.caption or ""), f"{device.name}: {'; '.join(tiers)}; {launch}"])
        )
    table.caption_justify = "left"
    return table


def _rate(device: Device, work: str, dtype: str, peak: float | None) -> str:
    curve = device.rates.get(work, {}).get(dtype)
    if curve is None:
        return "-"
    share = f" ({curve.maximum / peak:.0%})" if peak else ""
    return format_quantity(curve.maximum, "flops_per_second") + share


def _levels(cluster: Cluster) -> Table:
    table = Table(
        title="One message between two ranks, by the outermost level it crosses", title_justify="left"
    )
    for column in ("level", "latency", "64 KiB", "1 MiB", "64 MiB", "largest", "peak"):
        table.add_column(column, justify="left" if column == "level" else "right")
    for tier, level in enumerate(cluster.levels):
        step = cluster.sizes[tier - 1] if tier else 1
        if step >= cluster.world_size or level.count == 1:
            continue
        route = cluster.route(0, step)
        rates = [
            format_quantity(nbytes / route.seconds(nbytes), "bytes_per_second")
            for nbytes in (2**16, 2**20, MESSAGE)
        ]
        peak = level.peak_bytes_per_second
        table.add_row(
            escape(f"{level.level} {level.name}".strip()),
            format_quantity(route.latency_seconds, "seconds"),
            *rates,
            format_quantity(route.bytes_per_second, "bytes_per_second"),
            format_quantity(peak, "bytes_per_second") if peak else "-",
        )
    return table


def _matrix(cluster: Cluster, width: int) -> Table:
    ranks = range(max(1, min(cluster.world_size, MATRIX_RANKS, width // 6 - 1)))
    whole = "" if len(ranks) == cluster.world_size else f", first {len(ranks)} ranks"
    table = Table(
        title=f"GB/s of one 64 MiB message, from (row) to (column){whole}", title_justify="left", box=None
    )
    table.add_column("", justify="right")
    for rank in ranks:
        table.add_column(str(rank), justify="right")
    for source in ranks:
        cells = ["·" if d == source else _gigabytes(cluster.bandwidth(source, d, MESSAGE)) for d in ranks]
        table.add_row(str(source), *cells)
    return table


def _gigabytes(rate: float) -> str:
    return f"{rate / 1e9:.3g}"
