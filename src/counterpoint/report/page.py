"""A report as one HTML file that needs nothing else: no network, no other file, no server."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from counterpoint.report import blocks
from counterpoint.report.figure import text_on
from counterpoint.report.lanes import (
    channel_colours,
    channel_of,
    describe,
    exposed,
    is_pale,
    lay_out,
    plain,
    stream_order,
)
from counterpoint.report.sections import Section, Table, render_section, render_table
from counterpoint.report.units import format_seconds
from counterpoint.schedule.timeline import Timeline

HINT = "Drag to move, Ctrl + wheel to zoom, double-click a step; or focus it and use the arrow keys, + − 0."


def write_report(
    path: str | Path, timelines: dict[str, Timeline], *, title: str, sections: Sequence[Section] = ()
) -> Path:
    """Writes a self-contained HTML page about these timelines, and returns its path.

    The keys of `timelines` name them on the page. One timeline: a zoomable picture, categories, bytes per
    link, memory, the longest steps. Two: the same side by side, with differences (second minus first) line
    by line. Any other number: one after the other. The file appears whole or not at all. ValueError: a
    section that cannot be shown.
    """
    path = Path(path)
    before = [render_section(s) for s in sections if s.before_timelines]
    after = [render_section(s) for s in sections if not s.before_timelines]
    together = [timelines] if len(timelines) == 2 else [{name: t} for name, t in timelines.items()]
    named = len(together) > 1
    middle = [_timeline_blocks(group, named) for group in together]
    package = files("counterpoint.report")
    html = Template((package / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        lead=escape(_lead(timelines)),
        body="\n".join([*before, *middle, *after]),
        version=escape(_version()),
        script=(package / "viewer.js").read_text(encoding="utf-8"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(html, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _timeline_blocks(timelines: dict[str, Timeline], named: bool) -> str:
    compared = len(timelines) == 2
    parts = [blocks.cards(timelines)]
    parts += ["<h2>Timeline</h2>", _legend(timelines), _viewer(timelines)]
    parts.append("<h2>Where the time goes</h2>")
    parts.append(
        '<p class="note">Hidden: communication under way while a kernel runs. Exposed: communication under '
        "way and nothing runs; a receive counts from the moment it is posted. Idle: neither. Compute, "
        "exposed and idle add up to the whole.</p>"
    )
    parts.append(blocks.categories(timelines))
    part = blocks.part_recorded(timelines)
    only = f'<p class="note">Of {escape(part)} alone; {{}}.</p>' if part else ""
    parts += ["<h2>Bytes per link</h2>", only.format("parameters and gradients travel beside it")]
    parts.append(blocks.links(timelines))
    parts += [
        "<h2>Memory</h2>",
        only.format("what was predicted holds the model's state as well") if compared else "",
    ]
    parts.append(blocks.memory(timelines))
    parts.append(f"<h2>{'Largest differences' if compared else 'Longest steps'}</h2>")
    parts.append(blocks.steps(timelines))
    facts = [(k, *[plain(t.meta.get(k, "")) for t in timelines.values()]) for k in _meta_keys(timelines)]
    if facts:
        about = Table(["", *timelines], facts)
        parts += ["<h2>About the run</h2>", render_table(about)]
    if named:
        name = escape(next(iter(timelines)))
        parts = [f"<h2>{name}</h2>", *(p.replace("<h2>", "<h3>").replace("</h2>", "</h3>") for p in parts)]
    return f"<section>{''.join(parts)}</section>"


def _viewer(timelines: dict[str, Timeline]) -> str:
    # "<" would end the script element early, and U+2028 is a line end to some readers.
    data = json.dumps(viewer_data(timelines), separators=(",", ":")).replace("<", "\\u003c")
    what = ", ".join(f"{name}: {len(t.spans)} steps on {len(t.ranks)} ranks" for name, t in timelines.items())
    label = escape(f"Timeline, {what}. Arrow keys walk through the steps.", quote=True)
    return (
        '<div class="viewer"><div class="tools"><span class="hint">'
        f"{HINT}</span>"
        '<button type="button" value="-" aria-label="Zoom out">−</button>'
        '<button type="button" value="+" aria-label="Zoom in">+</button>'
        '<button type="button" value="0">Fit</button></div>'
        f'<canvas tabindex="0" role="application" aria-label="{label}"></canvas>'
        '<div class="tip" hidden></div><output aria-live="polite"></output>'
        f'<script type="application/json">{data}</script></div>'
    )


def viewer_data(timelines: dict[str, Timeline]) -> dict[str, Any]:
    """What viewer.js draws, times in microseconds after each timeline's first span; plain JSON values.

    A bar is [posted, begin, stop, name, kind, peer, bytes, flops, row, index of its partner or null].
    """
    moved = [t.shifted() for t in timelines.values()]
    order = stream_order(moved)
    colours = channel_colours(moved)
    names: dict[str, int] = {}
    groups = []
    laid = [lay_out(t, order) for t in moved]
    positions: dict[int, int] = {}
    ranks = sorted({rank for t in moved for rank in t.ranks})
    shown = [(rank, source) for rank in ranks for source in range(len(moved)) if rank in moved[source].ranks]
    for rank, source in shown:
        for lane in (lane for lane in laid[source] if lane.rank == rank):
            for bar in lane.bars:
                positions[id(bar.span)] = len(positions)
    for rank, source in shown:
        timeline = moved[source]
        lanes = []
        for lane in (lane for lane in laid[source] if lane.rank == rank):
            bars = []
            for bar in lane.bars:
                s = bar.span
                name = names.setdefault(s.name, len(names))
                partner = None if bar.partner is None else positions[id(timeline.spans[bar.partner])]
                times = [_micro(s.start), _micro(bar.begin), _micro(s.stop)]
                bars.append([*times, name, s.kind, s.peer, s.nbytes, s.flops, bar.row, partner])
            about = {"label": lane.label, "channel": lane.channel, "compute": lane.is_compute}
            lanes.append({**about, "pale": is_pale(lane), "rows": lane.rows, "bars": bars})
        events = sorted((m.time, m.live_bytes) for m in timeline.memory if m.rank == rank)
        groups.append(
            {
                "rank": rank,
                "source": source,
                "lanes": lanes,
                "exposed": [[_micro(a), _micro(b)] for a, b in exposed(timeline, rank)],
                "memory": [[_micro(time), n] for time, n in events],
                "peak": timeline.peak_bytes(rank),
            }
        )
    return {
        "stop": _micro(max((t.stop for t in moved), default=0.0)),
        "sources": list(timelines),
        "colours": colours,
        "dark": [colour for colour in colours.values() if text_on(colour) == "white"],
        "names": list(names),
        "groups": groups,
    }


def _legend(timelines: dict[str, Timeline]) -> str:
    keys = ['<span><i style="background:var(--compute)"></i>compute</span>']
    colours = channel_colours(timelines.values())
    channels = dict.fromkeys(channel_of(stream)[0] for stream in stream_order(timelines.values()))
    for channel in (c for c in channels if c in colours):
        keys.append(f'<span><i style="background:{colours[channel]}"></i>{escape(channel)}</span>')
    keys.append('<span><i class="wait"></i>posted, waiting</span>')
    keys.append('<span><i class="lost"></i>exposed</span>')
    return f'<div class="tools"><span class="keys">{"".join(keys)}<span>paler: received</span></span></div>'


def _meta_keys(timelines: dict[str, Timeline]) -> list[str]:
    return list(dict.fromkeys(key for t in timelines.values() for key in t.meta))


def _lead(timelines: dict[str, Timeline]) -> str:
    if not timelines:
        return ""
    if len(timelines) == 1:
        (timeline,) = timelines.values()
        return f"{describe(timeline, 200)} · {format_seconds(timeline.seconds)}"
    return " · ".join(f"{name}: {format_seconds(t.seconds)}" for name, t in timelines.items())


def _version() -> str:
    try:
        return version("counterpoint")
    except PackageNotFoundError:
        return "(not installed)"


def _micro(seconds: float) -> float:
    return round(seconds * 1e6, 3)
