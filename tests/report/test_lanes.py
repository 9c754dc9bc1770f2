"""Lanes, colours and pairs: what every picture of a timeline is made of."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.report.lanes import (
    MAX_ROWS,
    channel_colours,
    channel_of,
    clip,
    cut,
    exposed,
    lay_out,
    match_transfers,
    stream_order,
    transfer_begins,
)
from counterpoint.schedule.timeline import Span, Timeline

CHANNELS = ["q", "out", "dq", "kv", "dkv", "gather", "heads"]

times = st.floats(0, 10, allow_nan=False, width=32)
kinds = st.sampled_from(["compute", "copy", "send", "recv", "collective"])


@st.composite
def timelines(draw):
    spans = []
    for _ in range(draw(st.integers(0, 14))):
        a, b = sorted((draw(times), draw(times)))
        kind = draw(kinds)
        peer = 1 if kind in ("send", "recv") else None
        stream = "compute" if kind in ("compute", "copy") else f"q.{kind}"
        spans.append(Span(0, stream, kind, "step", a, b, peer=peer))
    return Timeline(spans=spans)


def moving(*channels):
    return Timeline(spans=[Span(0, f"{c}.send", "send", c, 0.0, 1.0, peer=1) for c in channels])


def test_a_stream_is_a_channel_and_a_direction():
    assert channel_of("q.send") == ("q", "send")
    assert channel_of("gather") == ("gather", "")
    assert channel_of("inner.kv.recv") == ("inner.kv", "recv")


@given(st.sets(st.sampled_from(CHANNELS), min_size=1))
def test_a_channel_keeps_its_colour_whoever_else_is_in_the_picture(channels):
    everyone = channel_colours([moving(*CHANNELS)])
    assert len(set(everyone.values())) == len(CHANNELS)
    assert channel_colours([moving(*channels)]) == {c: everyone[c] for c in channels}


def test_more_channels_than_colours_still_get_one_each():
    assert len(channel_colours([moving(*(f"c{i}" for i in range(20)))])) == 20


@given(timelines())
def test_exposed_intervals_add_up_to_the_exposed_category(timeline):
    lost = exposed(timeline, 0)
    assert sum(b - a for a, b in lost) == pytest.approx(timeline.categories(0)["exposed"], abs=1e-6)
    assert all(a < b for a, b in lost)
    assert all(b <= c for (_, b), (c, _) in pairwise(lost))


@given(timelines())
def test_bars_of_a_row_do_not_overlap_unless_the_lane_is_full(timeline):
    for lane in lay_out(timeline):
        assert len(lane.bars) == sum(s.stream == lane.stream for s in timeline.spans)
        for row in range(min(lane.rows, MAX_ROWS - 1)):
            bars = [bar for bar in lane.bars if bar.row == row]
            assert all(one.span.stop <= two.begin for one, two in pairwise(bars))


def test_every_send_finds_the_receive_of_the_same_value(tokenring):
    spans = tokenring(4, jitter=0.2, layers=2).spans
    pairs = match_transfers(spans)
    assert len(pairs) == sum(s.kind == "send" for s in spans) == sum(s.kind == "recv" for s in spans)
    for send, receive in pairs:
        a, b = spans[send], spans[receive]
        assert (a.kind, b.kind, a.peer, b.peer) == ("send", "recv", b.rank, a.rank)
        assert (a.name, a.nbytes, a.stop) == (b.name, b.nbytes, b.stop)


def test_a_receive_begins_when_its_sender_does(tokenring):
    timeline = tokenring(3, jitter=0.3)
    waited = 0
    for bar in (bar for lane in lay_out(timeline) for bar in lane.bars if bar.span.kind == "recv"):
        assert bar.begin == max(bar.span.start, timeline.spans[bar.partner].start)
        waited += bar.begin > bar.span.start
    assert waited


def test_a_receive_that_is_posted_late_begins_when_it_is_posted():
    sent = Span(0, "q.send", "send", "q", 0.0, 4.0, peer=1)
    late = Span(1, "q.recv", "recv", "q", 3.0, 4.0, peer=0)
    early = Span(1, "q.recv", "recv", "q", -2.0, -1.0, peer=0)
    assert transfer_begins([sent, late]) == [0.0, 3.0]
    # Clocks that disagree must not give a bar of negative length.
    assert transfer_begins([sent, early]) == [0.0, -1.0]


def test_streams_stand_in_one_order_for_all_ranks(tokenring):
    order = stream_order([tokenring(3)])
    assert order == ["compute", "q.send", "q.recv", "out.send", "out.recv", "dq.send", "dq.recv"]


def test_a_window_keeps_what_reaches_into_it_and_shares_end_at_its_edge():
    spans = [Span(0, "compute", "compute", str(i), 10.0 + i, 11.0 + i) for i in range(5)]
    shown = clip(Timeline(spans=spans), (1.5, 2.5))
    assert [s.name for s in shown.spans] == ["1", "2"]
    assert cut(shown, (1.5, 2.5), 0).categories(0)["compute"] == pytest.approx(1.0)


@pytest.mark.parametrize("window", [(1.0, 1.0), (2.0, 1.0)])
def test_an_empty_window_is_refused(window):
    with pytest.raises(ValueError, match="start < stop"):
        clip(Timeline(), window)
