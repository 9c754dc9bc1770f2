"""The heap of events against sorting."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.simulator.events import FLOW_ENDS, INDICES, Events, drop, forget_outdated, make_events, push

EVENT = st.tuples(st.integers(0, 5).map(float), st.integers(0, 3), st.integers(0, 4))


def first(events: Events) -> tuple[float, int, int]:
    return float(events.time[0]), *divmod(int(events.what[0]), INDICES)


@given(st.lists(EVENT | st.none(), max_size=60))
def test_the_earliest_event_is_first_then_that_of_the_lower_kind_and_index(actions):
    events, expected = make_events(len(actions) + 1), []
    for action in actions:
        if action:
            push(events, *action, 0)
            expected = sorted([*expected, action])
        elif expected:
            drop(events)
            expected.pop(0)
        assert events.size[0] == len(expected)
        assert not expected or first(events) == expected[0]


@given(st.lists(st.tuples(EVENT, st.integers(0, 1)), max_size=40))
def test_outdated_ends_of_flows_go_and_the_rest_keeps_its_order(pushed):
    events = make_events(len(pushed) + 1)
    for event, version in pushed:
        push(events, *event, version)
    forget_outdated(events, np.ones(5, np.int64))
    expected = sorted(event for event, version in pushed if event[1] != FLOW_ENDS or version == 1)
    assert events.size[0] == len(expected)
    for event in expected:
        assert first(events) == event
        drop(events)
