"""Terminal tables and the text Gantt show the timeline's own numbers in lines of the right width."""

import pytest
from rich.console import Console

from counterpoint.report.numbers import longest_steps
from counterpoint.report.tables import category_table, link_table, text_timeline
from counterpoint.report.units import (
    format_bytes,
    format_change,
    format_seconds,
    format_share,
)


def printed(table):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.0, "1.00 s"),
        (0.9996, "1.00 s"),
        (0.0123, "12.3 ms"),
        (5e-5, "50.0 µs"),
        (0, "0 s"),
        (-2e-3, "-2.00 ms"),
    ],
)
def test_seconds_are_written_with_three_digits(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (8_519_680, "8.52 MB"), (10**12, "1.00 TB")],
)
def test_bytes_have_decimal_prefixes(nbytes, text):
    assert format_bytes(nbytes) == text


def test_shares_and_changes_of_nothing_are_dashes():
    assert (format_share(0, 0), format_change(0, 1), format_change(2, 3)) == ("–", "–", "+50.0 %")


def test_category_and_link_tables_print_what_the_timeline_says(tokenring):
    timeline = tokenring(3, jitter=0.2)
    categories = printed(category_table(timeline))
    links = printed(link_table(timeline))
    for rank in timeline.ranks:
        line = next(line for line in categories.splitlines() if line.startswith(f"│{rank:>5} │"))
        for seconds in timeline.categories(rank).values():
            assert format_seconds(seconds) in line
            assert format_share(seconds, timeline.seconds) in line
        assert format_bytes(timeline.peak_bytes(rank)) in line
        row = next(line for line in links.splitlines() if line.startswith(f"│{rank:>5} │"))
        cells = [cell.strip() for cell in row.strip("│").split("│")][1:-1]
        sent = [timeline.bytes_by_link().get((rank, other), 0) for other in timeline.ranks]
        assert cells == [format_bytes(n) if n else "–" for n in sent]
        assert format_bytes(timeline.bytes_sent(rank)) in row


def test_two_timelines_are_told_apart_line_by_line(tokenring):
    slow, fast = tokenring(2, source="measured"), tokenring(2, flops_per_second=240e9)
    lines = printed(category_table(slow, fast)).splitlines()
    a, b = slow.categories(1)["compute"], fast.categories(1)["compute"]
    line = next(line for line in lines if line.startswith("│    1 │ compute"))
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[2:] == [format_seconds(a), format_seconds(b), format_seconds(b - a), "-50.0 %"]


def test_longest_steps_leave_waiting_out(tokenring):
    timeline = tokenring(4, jitter=0.1)
    lines = longest_steps([timeline], 5)
    seconds = [step.seconds for line in lines for step in line.steps if step]
    assert seconds == sorted(seconds, reverse=True)
    assert all(line.span.kind == "compute" for line in lines)
    assert max(s.seconds for s in timeline.spans if s.kind == "recv") > seconds[-1]


def test_differences_are_paired_by_name_and_occurrence(tokenring):
    one, two = tokenring(2, layers=2), tokenring(2, layers=2, bytes_per_second=110e6)
    for line in longest_steps([one, two], 8):
        assert line.span.kind in ("send", "recv")
        assert line.difference == pytest.approx(line.span.nbytes / 110e6 - line.span.nbytes / 220e6, rel=1e-6)


@pytest.mark.parametrize("width", [40, 77, 120])
@pytest.mark.parametrize("ascii", [True, False])
def test_every_line_of_the_gantt_has_the_width(tokenring, width, ascii):
    timeline = tokenring(3, jitter=0.1)
    lines = text_timeline(timeline, width, ascii=ascii).splitlines()
    assert {len(line) for line in lines} == {width}
    assert len(lines) == sum(len(timeline.streams(rank)) for rank in timeline.ranks) + 2
    assert not ascii or "".join(lines).isascii()


def test_cells_of_the_gantt_are_shares_of_the_time(tokenring):
    timeline = tokenring(2)
    lines = text_timeline(timeline, 213, ascii=True).splitlines()
    for rank in (0, 1):
        (line,) = [line for line in lines if line.startswith(f" {rank} compute")]
        values = timeline.categories(rank)
        assert line.count("#") / 200 == pytest.approx(values["compute"] / timeline.seconds, abs=0.03)
        assert line.count("!") / 200 == pytest.approx(values["exposed"] / timeline.seconds, abs=0.03)


def test_a_window_magnifies(tokenring):
    timeline = tokenring(2)
    lines = text_timeline(timeline, 100, window=(0.0, 0.01), ascii=True).splitlines()
    assert next(line for line in lines if line.startswith(" 0 q.send")).count(">") > 80
    assert not any("dq" in line for line in lines)


def test_degenerate_timelines_have_tables_and_a_gantt(degenerate):
    for timeline in degenerate.values():
        assert {len(line) for line in text_timeline(timeline, 64).splitlines()} == {64}
        assert printed(category_table(timeline))
        assert printed(category_table(timeline, degenerate["one span"]))
        assert "sum" in printed(link_table(timeline))


def test_a_narrow_gantt_is_refused(tokenring):
    with pytest.raises(ValueError, match="at least 40"):
        text_timeline(tokenring(1), 39)
