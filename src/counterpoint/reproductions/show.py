"""Tables and JSON of reproductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from counterpoint.reproductions.check import Result, holds
from counterpoint.reproductions.registry import System, load, systems

STYLES = {
    "holds": "green",
    "outside": "bold red",
    "failed": "bold red",
    "reported": "yellow",
    "not carried out": "yellow",
}


def results_table(system: System, results: Sequence[Result]) -> RenderableType:
    """Claim, got, difference, kind and verdict of every check; below it, what there is to say about some."""
    table = Table(
        title=f"{system.name}: {escape(system.title)} (arXiv {system.arxiv})",
        title_justify="left",
        expand=False,
    )
    table.add_column("claim", overflow="fold")
    for column in ("claimed", "got", "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("kind", "tolerance", "verdict"):
        table.add_column(column, overflow="fold")
    notes: list[str] = []
    for result in results:
        check, mark = result.check, ""
        said = result.error or (check.note if result.verdict != "holds" else "")
        if said:
            notes = notes if said in notes else [*notes, said]
            mark = f" [{notes.index(said) + 1}]"
        verdict = Text(result.verdict + mark, style=STYLES[result.verdict])
        table.add_row(
            escape(check.claim), figure(check.value, check.unit), figure(result.got, check.unit), difference(result),
            check.kind, str(check.tolerance) if check.tolerance else "none", verdict,
        )  # fmt: skip
    below = [Text(f"[{i}] {note}") for i, note in enumerate(notes, 1)]
    below += [Text(remark) for remark in load(system).remarks]
    return Group(table, *below, Text(summary(results)))


def summary(results: Sequence[Result]) -> str:
    """How many checks came out, in a line."""
    judged = [r for r in results if r.verdict not in ("reported", "not carried out")]
    held = sum(r.verdict == "holds" for r in judged)
    without = sum(r.verdict == "reported" for r in results)
    tail = f"; reported without a verdict: {without}" if without else ""
    if left_out := len(results) - len(judged) - without:
        tail += f"; not carried out on this machine: {left_out}"
    return f"{held} of {len(judged)} claims come out within their tolerance{tail}"


def results_json(system: System, results: Sequence[Result]) -> dict[str, Any]:
    return {
        "name": system.name,
        "title": system.title,
        "year": system.year,
        "arxiv": system.arxiv,
        "holds": holds(results),
        "remarks": list(load(system).remarks),
        "checks": [result.to_json() for result in results],
    }


def figure(value: float | None, unit: str) -> str:
    """A figure with its unit; bytes and elements in full, because they must agree to the last one."""
    if value is None:
        return "-"
    if unit in ("bytes", "elements", "tokens"):
        text = f"{value:,.0f}"
    else:
        text = f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:,.4g}"
    return f"{text} {unit}".rstrip()


def difference(result: Result) -> str:
    if result.difference is None:
        return "-"
    if not result.check.value:
        return f"{result.difference:.1e}"
    return f"{result.difference * 100:+.1f} %" if result.difference else "0"


def systems_table() -> Table:
    """Every system with its state, and what is checked where it is reproduced."""
    known = systems()
    done = sum(system.state == "reproduced" for system in known)
    table = Table(title=f"{len(known)} published systems, {done} reproduced", title_justify="left")
    for column in ("name", "year", "arXiv", "room", "state", "what is checked (planned: the paper)"):
        table.add_column(column, overflow="fold")
    for system in known:
        style = "green" if system.state == "reproduced" else None
        name = f"{system.name} ({system.alias})" if system.alias else system.name
        table.add_row(
            name, str(system.year), system.arxiv, system.room, Text(system.state, style=style or ""), checked(system)
        )  # fmt: skip
    return table


def checked(system: System) -> str:
    """What the checks of a system cover; its title when there are none yet."""
    if system.state != "reproduced":
        return escape(system.title)
    reproduction = load(system)
    counts = ", ".join(f"{n} {kind}" for kind, n in reproduction.kinds().items())
    return f"{reproduction.summary} ({counts})"


def systems_json() -> list[dict[str, Any]]:
    rows = []
    for system in systems():
        reproduction = load(system) if system.state == "reproduced" else None
        rows.append(
            {
                "name": system.name,
                "alias": system.alias or None,
                "title": system.title,
                "year": system.year,
                "arxiv": system.arxiv,
                "room": system.room,
                "state": system.state,
                "summary": reproduction.summary if reproduction else None,
                "checks": reproduction.kinds() if reproduction else {},
            }
        )
    return rows
