"""What a run on a scale model showed, as a table, a page and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from counterpoint.emulation.published import published
from counterpoint.emulation.result import LATE, Emulation, PassResult, to_json
from counterpoint.emulation.scale import strategies
from counterpoint.report.page import write_report
from counterpoint.report.sections import Section, Table
from counterpoint.report.units import format_seconds

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_STEPS_TEXT = (
    "Times between the starts of a rank's attention kernels. Measured and simulated: of the scale model, divided by "
    "its slowdown."
)
BUSY = "other programs keep this machine busy, so run it again when it is idle"
COLUMNS = ("pass", "on", "measured", "simulated", "difference", "bytes sent")


def rows(emulation: Emulation) -> list[tuple[str, ...]]:
    """Cells of the table: for every pass the scale model, and the cluster that it stands for."""
    found = []
    for p in emulation.passes:
        spread = f" ({format_seconds(min(p.measured))} to {format_seconds(max(p.measured))})"
        found.append(
            (
                p.which,
                "scale model",
                format_seconds(p.seconds) + spread,
                format_seconds(p.simulated),
                f"{p.error:+.1%}",
                f"{p.sent_bytes:,}",
            )
        )
        as_real = p.seconds / emulation.scale.slowdown
        found.append(
            (
                "",
                emulation.cluster.name,
                f"{format_seconds(as_real)} (measured / {emulation.scale.slowdown:.4g})",
                format_seconds(p.real),
                f"{as_real / p.real - 1:+.1%}",
                f"{p.sent_bytes_expected:,}",
            )
        )
    return found


STEP_COLUMNS = ("attention step", "measured", "simulated", "on the cluster", "published")


def step_rows(emulation: Emulation) -> list[tuple[str, ...]]:
    """Cells of a table of the forward pass, where figures of its steps are published; all times the cluster's."""
    known = published(emulation.cluster.name, emulation.target)
    forward = next((p for p in emulation.passes if p.which == "forward"), None)
    if known is None or forward is None:
        return []
    slowdown = emulation.scale.slowdown
    columns = (
        [t / slowdown for t in forward.measured_steps],
        [t / slowdown for t in forward.simulated_steps],
        forward.real_steps,
        known.step_seconds,
    )
    return [(str(i), *(format_seconds(t) for t in times)) for i, times in enumerate(zip(*columns), 1)]


def summary(emulation: Emulation) -> str:
    """How the scale model was made, in a few sentences."""
    e = emulation
    compute = (
        "kernels are held for their time on the cluster's device"
        if e.compute == "timed"
        else "kernels compute on this machine"
    )
    text = (
        f"{e.cluster.world_size} ranks, {e.wires} links of {len(e.cluster.levels)} levels; {compute}. Everything "
        f"takes {e.scale.slowdown:.4g} times as long as on the cluster, over {e.problem.layout.tokens:,} tokens "
        f"that stand for {e.target.layout.tokens:,}; so rates are divided by {e.scale.rates:.4g}. Links have this "
        f"machine's own latency of {e.latency_seconds * 1e3:.2f} ms, which the simulation of the scale model uses."
    )
    late = max(late for p in e.passes for late in p.late)
    should = "were to be held" if e.compute == "timed" else "took alone"
    text += f" A rank's kernels took longer than they {should} by up to {late:.1%} of a pass"
    text += f"; {BUSY}." if late > LATE else "."
    if e.worst_difference is not None:
        text += f" Results differ from one process by {e.worst_difference:.1e} relative."
    return text


def emulation_table(emulation: Emulation) -> RichTable:
    from rich.table import Table as RichTable

    e = emulation
    name = strategies(e.target)[0]
    table = RichTable(title=f"{name} on {e.cluster.name}", caption=summary(e), title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("pass", "on") else "right")
    for row in rows(e):
        table.add_row(*row)
    return table


def steps_table(emulation: Emulation) -> RichTable | None:
    """The table of published figures; None where none are known."""
    from rich.table import Table as RichTable

    found = step_rows(emulation)
    if not found:
        return None
    known = published(emulation.cluster.name, emulation.target)
    assert known is not None
    table = RichTable(
        title="Published figures", caption=f"{_STEPS_TEXT} {known.source}.", title_justify="left"
    )
    for column in STEP_COLUMNS:
        table.add_column(column, justify="right")
    for row in found:
        table.add_row(*row)
    return table


def write_directory(emulation: Emulation, directory: Path) -> Path:
    """Write the page with measured and simulated side by side, the timelines and the figures; returns the page."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "emulation.json").write_text(json.dumps(to_json(emulation), indent=1) + "\n")
    pages = [_write_pass(emulation, p, directory) for p in emulation.passes]
    return pages[0]


def _write_pass(emulation: Emulation, result: PassResult, directory: Path) -> Path:
    name = result.which
    result.measured_timeline.write(directory / f"{name}-measured.json")
    result.simulated_timeline.write(directory / f"{name}-simulated.json")
    result.real_timeline.write(directory / f"{name}-cluster.json")
    sections = [
        Section("Scale model", summary(emulation), Table(COLUMNS, rows(emulation)), before_timelines=True)
    ]
    if steps := step_rows(emulation):
        sections.append(
            Section("Published figures", _STEPS_TEXT, Table(STEP_COLUMNS, steps), before_timelines=True)
        )
    return write_report(
        directory / ("report.html" if len(emulation.passes) == 1 else f"report-{name}.html"),
        {"simulated": result.simulated_timeline, "measured": result.measured_timeline},
        title=f"{name} {strategies(emulation.target)[0]} on a scale model of {emulation.cluster.name}",
        sections=sections,
    )
