"""Blocks that a caller adds to a report page: text, a table, a line chart, samples, a picture.

Whatever a caller passes is text; it is escaped here, so that a sampled `<script>` stays a sample.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from counterpoint.report.chart import LineChart, render_chart

_NUMBER = re.compile(r"[+\-−–]?[\d.,]*\d|–")


@dataclass(frozen=True, slots=True)
class Table:
    """Column names and rows of cells; a column of numbers is set to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands below it, in this order: text, table, chart, preformatted text, picture.

    `text` holds paragraphs parted by empty lines; `png` is a PNG's bytes or path, described by `png_text`.
    `before_timelines` puts the section above the timelines rather than below them.
    """

    heading: str
    text: str = ""
    table: Table | None = None
    chart: LineChart | None = None
    preformatted: str = ""
    png: bytes | str | Path | None = None
    png_text: str = ""
    before_timelines: bool = False


def render_section(section: Section) -> str:
    """The section as HTML. ValueError: a picture that is not a PNG, a table row of another length."""
    parts = [f"<h2>{escape(section.heading)}</h2>"]
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", section.text)]
    parts += [f"<p>{escape(p)}</p>" for p in paragraphs if p]
    if section.table is not None:
        parts.append(render_table(section.table))
    if section.chart is not None:
        parts.append(render_chart(section.chart))
    if section.preformatted:
        parts.append(f"<pre>{escape(section.preformatted)}</pre>")
    if section.png is not None:
        parts.append(_picture(section.png, section.png_text or section.heading))
    return f"<section>{''.join(parts)}</section>"


def render_table(table: Table) -> str:
    """The table as HTML; long texts wrap, numbers do not."""
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(f"table row {list(row)!r} has {len(row)} cells for {len(table.columns)} columns")
    wide = [_is_number_column([row[i] for row in table.rows]) for i in range(len(table.columns))]
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    kinds = ["number" if number else "text" for number in wide]
    head = "".join(f'<th scope="col" class="{k}">{escape(c)}</th>' for k, c in zip(kinds, table.columns))
    rows = "".join(
        "<tr>" + "".join(f'<td class="{k}">{escape(str(cell))}</td>' for k, cell in zip(kinds, row)) + "</tr>"
        for row in table.rows
    )
    return scrolling(f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")


def scrolling(table: str) -> str:
    """Lets a wide table scroll on its own; it can be reached by keyboard for that."""
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _is_number_column(cells: list[object]) -> bool:
    texts = [str(cell).strip() for cell in cells]
    return bool(texts) and all(_NUMBER.match(text) for text in texts)


def _picture(png: bytes | str | Path, text: str) -> str:
    data = png if isinstance(png, bytes) else Path(png).read_bytes()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        given = f"{len(data)} bytes" if isinstance(png, bytes) else str(png)
        raise ValueError(f"a section's picture must be a PNG, and {given} is not one: save it as .png")
    encoded = base64.b64encode(data).decode()
    return f'<img alt="{escape(text, quote=True)}" src="data:image/png;base64,{encoded}">'
