"""Max-min fairness as a property, on random networks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.simulator.compiler import Compiler
from counterpoint.simulator.events import make_events
from counterpoint.simulator.fold import Symmetry
from counterpoint.simulator.network import end_flow, make_flows, rebalance, start_flow
from simulator.by_hand import cluster, schedules

EMPTY = Compiler(cluster(), [0], Symmetry((1,)))
EMPTY.add(schedules(lambda b: {})[0])
PROGRAM = EMPTY.finish("direct")


@st.composite
def networks(draw):
    resources, flows = draw(st.integers(1, 6)), draw(st.integers(1, 10))
    capacity = draw(st.lists(st.integers(1, 20), min_size=resources, max_size=resources))
    limits = draw(st.lists(st.integers(1, 20), min_size=flows, max_size=flows))
    subset = st.sets(st.integers(0, resources - 1), max_size=3)
    routes = draw(st.lists(subset.map(sorted), min_size=flows, max_size=flows))
    gone = draw(st.sets(st.integers(0, flows - 1)))
    return capacity, limits, routes, gone


@given(networks())
@settings(max_examples=300, deadline=None)
def test_no_flow_can_gain_but_from_one_that_has_no_more(network):
    capacity, limits, routes, gone = network
    n = len(limits)
    program = PROGRAM._replace(
        message_bytes=np.full(n, 1e9),
        message_limit=np.array(limits, float),
        message_route=np.arange(n),
        route_at=np.cumsum([0, *map(len, routes)]),
        route_resources=np.array([r for route in routes for r in route], int),
        route_weights=np.ones(sum(map(len, routes))),
        capacity=np.array(capacity, float),
    )
    flows, events = make_flows(n, len(capacity), 3), make_events(n * (2 * n + 1))
    slots = {}
    for message in range(n):  # one by one, so that every change goes through the partial recomputation
        start_flow(program, flows, 3, message, 0.0)
        slots[message] = int(np.flatnonzero(flows.message == message)[0])
        rebalance(program, flows, 3, 0.0, events)
    for message in sorted(gone):
        assert end_flow(program, flows, 3, slots[message]) == message
        rebalance(program, flows, 3, 0.0, events)
    rates = {m: flows.rate[slots[m]] for m in range(n) if m not in gone}
    used = [sum(rate for m, rate in rates.items() if r in routes[m]) for r in range(len(capacity))]
    assert all(u <= c * (1 + 1e-6) for u, c in zip(used, capacity, strict=True))
    for m, rate in rates.items():
        at_limit = rate == pytest.approx(limits[m])
        bottleneck = any(
            used[r] == pytest.approx(capacity[r])
            and all(rate >= other * (1 - 1e-6) for o, other in rates.items() if r in routes[o])
            for r in routes[m]
        )
        assert at_limit or bottleneck, (m, rates)
