"""The blocks of a report page that are made of a timeline: figures, categories, links, memory, steps.

Every number that is shown rounded carries its exact value in a data attribute, so that a script, or a test,
can read the page.
"""

from __future__ import annotations

from html import escape

from counterpoint.report.chart import LineChart, render_chart
from counterpoint.report.lanes import channel_of
from counterpoint.report.numbers import CATEGORIES, all_ranks, category_lines, link_lines, longest_steps
from counterpoint.report.sections import scrolling
from counterpoint.report.units import (
    NOTHING,
    format_bytes,
    format_change,
    format_seconds,
    format_share,
    signed,
)
from counterpoint.schedule.timeline import RECORDED, Timeline

MOST_MEMORY_LINES = 8
_COLOURS = {"compute": "--compute", "exposed": "--exposed", "idle": "--idle"}


def part_recorded(timelines: dict[str, Timeline]) -> str:
    """The part of a step whose messages and memory one of the timelines is limited to; "" for the whole."""
    return next((part for t in timelines.values() if (part := t.meta.get(RECORDED, ""))), "")


def messages_of(part: str, timeline: Timeline) -> Timeline:
    """The timeline without the messages of other parts of the step, so that its bytes can be compared."""
    if not part:
        return timeline
    spans = [s for s in timeline.spans if not s.phase or s.phase.startswith(part)]
    return Timeline(timeline.source, spans, timeline.memory, timeline.meta)


def cards(timelines: dict[str, Timeline]) -> str:
    """The figures to read first: time, shares over all ranks, bytes and peak; of two timelines, both.

    Where one recorded a part of a step only, bytes of both are of that part, and peaks are left out.
    """
    shown, part, figures = list(timelines.values()), part_recorded(timelines), []
    sent = f"Bytes sent for {part}" if part else "Bytes sent"
    for t in shown:
        ranks = t.ranks
        total = {c: sum(t.categories(rank)[c] for rank in ranks) for c in CATEGORIES}
        whole = t.seconds * len(ranks)
        traffic = messages_of(part, t).bytes_by_link().values()
        figures.append(
            {
                "Time": format_seconds(t.seconds),
                "Computing": format_share(total["compute"], whole),
                "Traffic hidden": format_share(total["hidden"], total["hidden"] + total["exposed"]),
                "Time exposed": format_share(total["exposed"], whole),
                sent: format_bytes(sum(traffic)),
            }
        )
        if not part or len(shown) == 1:
            peak = max((t.peak_bytes(rank) for rank in ranks), default=0)
            figures[-1][f"Peak of {part}" if part else "Peak of a rank"] = format_bytes(peak)
    items = []
    for name, first in (figures[0] if figures else {}).items():
        values = [f"<b>{first}</b>"]
        if len(figures) > 1:
            values = [
                f"<b>{f[name]} <small>{escape(label)}</small></b>" for f, label in zip(figures, timelines)
            ]
        items.append(f"<li><span>{name}</span>{''.join(values)}</li>")
    return f'<ul class="cards">{"".join(items)}</ul>'


def categories(timelines: dict[str, Timeline]) -> str:
    """Seconds and share of each category per rank; of two timelines also the differences."""
    if len(timelines) > 1:
        return _category_differences(timelines)
    (timeline,) = timelines.values()
    head = "".join(f'<th scope="col" class="number">{c}</th>' for c in CATEGORIES)
    rows = []
    for rank in timeline.ranks:
        values = timeline.categories(rank)
        cells = []
        for category, value in values.items():
            style = "number exposed" if category == "exposed" else "number"
            share = format_share(value, timeline.seconds)
            marked = f'data-rank="{rank}" data-category="{category}" data-seconds="{value!r}"'
            cells.append(f'<td class="{style}" {marked}>{format_seconds(value)} <small>{share}</small></td>')
        parts = [
            f'<i style="width:{_percent(values[c], timeline.seconds)};background:var({v})"></i>'
            for c, v in _COLOURS.items()
        ]
        bar = f'<td><div class="bar" aria-hidden="true">{"".join(parts)}</div></td>'
        rows.append(f'<tr><th scope="row">rank {rank}</th>{"".join(cells)}{bar}</tr>')
    table = f"<table><thead><tr><th></th>{head}<th></th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return scrolling(table)


def _category_differences(timelines: dict[str, Timeline]) -> str:
    names = "".join(f'<th scope="col" class="number">{escape(name)}</th>' for name in timelines)
    rows = []
    for line in category_lines(list(timelines.values())):
        cells = []
        for name, value in zip(timelines, line.seconds):
            if value is None:
                cells.append(f'<td class="number">{NOTHING}</td>')
                continue
            marked = f'data-rank="{line.rank}" data-category="{line.category}" data-seconds="{value!r}"'
            text = f"{format_seconds(value)} <small>{format_share(value, timelines[name].seconds)}</small>"
            cells.append(
                f'<td class="number" data-timeline="{escape(name, quote=True)}" {marked}>{text}</td>'
            )
        cells += _difference(line.seconds[0], line.seconds[1], seconds=True)
        first = line.category == CATEGORIES[0]
        rank = f'<th scope="rowgroup" rowspan="{len(CATEGORIES)}">rank {line.rank}</th>' if first else ""
        style = ' class="new"' if first else ""
        rows.append(f"<tr{style}>{rank}<td>{line.category}</td>{''.join(cells)}</tr>")
    head = f'<th></th><th></th>{names}<th class="number">difference</th><th class="number">change</th>'
    return scrolling(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>")


def links(timelines: dict[str, Timeline]) -> str:
    """A heat map of payload bytes for each timeline; of two, also the lines in which they differ."""
    part = part_recorded(timelines)
    timelines = {name: messages_of(part, t) for name, t in timelines.items()}
    shown = list(timelines.values())
    largest = max((n for t in shown for n in t.bytes_by_link().values()), default=0)
    ranks = all_ranks(shown)
    parts = [_matrix(name, t, ranks, largest) for name, t in timelines.items()]
    html = f'<div class="pair">{"".join(parts)}</div>'
    if len(shown) != 2:
        return html
    lines = link_lines(shown)
    different = [(link, both) for link, both in lines if both[0] != both[1]]
    if not different:
        return html + f'<p class="note">Both count the same bytes on each of {len(lines)} links.</p>'
    rows = []
    for (source, destination), (a, b) in different:
        cells = f'<td class="number">{format_bytes(a)}</td><td class="number">{format_bytes(b)}</td>'
        cells += "".join(_difference(a, b, seconds=False))
        rows.append(f'<tr><th scope="row">{source} to {destination}</th>{cells}</tr>')
    names = "".join(f'<th class="number">{escape(name)}</th>' for name in timelines)
    head = f'<th>link</th>{names}<th class="number">difference</th><th class="number">change</th>'
    note = f'<p class="note">{len(different)} of {len(lines)} links differ.</p>'
    return (
        html
        + note
        + scrolling(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>")
    )


def _matrix(name: str, timeline: Timeline, ranks: list[int], largest: int) -> str:
    used = timeline.bytes_by_link()
    rows = []
    for source in ranks:
        cells = []
        for destination in ranks:
            nbytes = used.get((source, destination), 0)
            if not nbytes:
                cells.append("<td></td>")
                continue
            strength = 12 + 88 * nbytes / largest
            style = "link strong" if strength > 60 else "link"
            marked = f'data-source="{source}" data-destination="{destination}" data-bytes="{nbytes}"'
            marked += f' title="{nbytes:,} bytes from rank {source} to rank {destination}"'
            shade = f'style="--strength:{strength:.0f}%"'
            cells.append(f'<td class="{style}" {shade} {marked}>{format_bytes(nbytes)}</td>')
        total = f'<td class="sum">{format_bytes(timeline.bytes_sent(source))}</td>'
        rows.append(f'<tr><th scope="row">{source}</th>{"".join(cells)}{total}</tr>')
    sums = "".join(f'<td class="sum">{format_bytes(timeline.bytes_received(rank))}</td>' for rank in ranks)
    rows.append(
        f'<tr><th scope="row">sum</th>{sums}<td class="sum">{format_bytes(sum(used.values()))}</td></tr>'
    )
    head = "".join(f'<th scope="col">{rank}</th>' for rank in ranks)
    caption = f"<caption>{escape(name)}: from rank (row) to rank (column)</caption>"
    body = f"<thead><tr><th></th>{head}<th>sum</th></tr></thead><tbody>{''.join(rows)}</tbody>"
    return scrolling(
        f'<table class="matrix" data-timeline="{escape(name, quote=True)}">{caption}{body}</table>'
    )


def memory(timelines: dict[str, Timeline]) -> str:
    """Live bytes over time, a line per rank; of many ranks those with the largest peaks."""
    lines: dict[str, list[tuple[float, float]]] = {}
    peaks: dict[str, int] = {}
    for name, timeline in timelines.items():
        moved = timeline.shifted()
        for rank in timeline.ranks:
            label = f"rank {rank}" if len(timelines) == 1 else f"rank {rank}, {name}"
            events = [(m.time, float(m.live_bytes)) for m in moved.memory if m.rank == rank]
            if events:
                events.sort(key=lambda event: event[0])
                lines[label] = [*events, (max(moved.stop, events[-1][0]), events[-1][1])]
                peaks[label] = timeline.peak_bytes(rank)
    if not lines:
        return '<p class="note">This timeline carries no memory events.</p>'
    largest = sorted(lines, key=lambda label: -peaks[label])[:MOST_MEMORY_LINES]
    shown = {
        f"{label}: peak {format_bytes(peaks[label])}": lines[label] for label in lines if label in largest
    }
    chart = LineChart(shown, "time", "live bytes", "seconds", "bytes", steps=True, from_zero=True)
    hidden = len(lines) - len(shown)
    note = f'<p class="note">{hidden} lines with smaller peaks are left out.</p>' if hidden else ""
    return render_chart(chart) + note


def steps(timelines: dict[str, Timeline], count: int = 12) -> str:
    """The longest steps; of two timelines the steps whose durations differ most."""
    shown = list(timelines.values())
    rows = []
    for line in longest_steps(shown, count):
        s = line.span
        peer = "" if s.peer is None else f"{'from' if s.kind == 'recv' else 'to'} {s.peer}"
        stream = " ".join(part for part in channel_of(s.stream) if part)
        cells = f"<td>{s.rank}</td><td>{escape(stream)}</td><td>{escape(s.name)}</td><td>{peer}</td>"
        cells += f'<td class="number">{format_bytes(s.nbytes) if s.nbytes else NOTHING}</td>'
        for step in line.steps:
            exact = f' data-seconds="{step.seconds!r}"' if step else ""
            cells += f'<td class="number"{exact}>{format_seconds(step.seconds) if step else NOTHING}</td>'
        if len(shown) == 1:
            waited, begin = (line.steps[0].waited, line.steps[0].begin) if line.steps[0] else (0.0, 0.0)
            cells += f'<td class="number">{format_seconds(waited) if waited else NOTHING}</td>'
            cells += f'<td class="number">{format_seconds(begin - shown[0].start)}</td>'
        else:
            a, b = (step.seconds if step else None for step in line.steps)
            cells += "".join(_difference(a, b, seconds=True))
        rows.append(f"<tr>{cells}</tr>")
    if not rows:
        return '<p class="note">No steps were recorded.</p>'
    head = '<th>rank</th><th>stream</th><th>step</th><th>peer</th><th class="number">size</th>'
    numbers = ["takes", "after waiting", "begins at"]
    if len(shown) > 1:
        numbers = [*timelines, "difference", "change"]
    head += "".join(f'<th class="number">{escape(name)}</th>' for name in numbers)
    return scrolling(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>")


def _difference(a: float | None, b: float | None, seconds: bool) -> list[str]:
    if a is None or b is None:
        return [f'<td class="number">{NOTHING}</td>'] * 2
    text = format_seconds(b - a) if seconds else format_bytes(b - a)
    exact = f'data-difference="{b - a!r}"'
    return [
        f'<td class="number" {exact}>{signed(text, b - a)}</td>',
        f'<td class="number">{format_change(a, b)}</td>',
    ]


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3f}%" if whole else "0%"
