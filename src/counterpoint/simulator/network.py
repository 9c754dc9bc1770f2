"""Flows that share resources: max-min fair rates, recomputed where something changed.

A flow passes some resources (ports, links, ...) of limited capacity and has a limit of its own. Rates are max-min
fair: no flow can get more without taking from one that has no more than it. They are found by filling: all flows
rise together until a resource is full or a flow reaches its limit; those stay, the others rise on.

Only flows that a change can reach are computed anew: those joined to it by resources that are really contended. A
resource whose flows could all run at their own limits joins nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from counterpoint.simulator.events import FLOW_ENDS, Events, push
from counterpoint.simulator.program import Array, Program

SLACK = 1e-9  # relative difference below which two rates count as equal


class Flows(NamedTuple):
    """Flows under way, in slots. Every flow has up to `width` entries in the lists of the resources it passes."""

    message: Array  # (slots,) which message moves, -1 for a free slot
    remaining: Array  # (slots,) bytes still to move at time `since`
    since: Array
    rate: Array  # (slots,) bytes per second
    version: Array  # (slots,) counts the predicted ends, so that outdated ones are recognised
    free: Array  # (slots,) stack of free slots
    used: Array  # (1,) slots taken from the stack
    head: Array  # (resources,) first entry of a resource's list of flows
    after: Array  # (slots * width,) next entry of the list
    before: Array
    count: Array  # (resources,) flows on it
    load: Array  # (resources,) sum of what its flows would take at their own limits
    dirty: Array  # (resources,) stack of resources whose flows must be computed anew
    is_dirty: Array
    fresh: Array  # (slots,) stack of flows without a rate
    marks: Array  # (2,) heights of the two stacks
    # scratch of the filling
    group: Array  # (slots,) flows reached
    in_group: Array
    target: Array  # (slots,) new rates
    pool: Array  # (resources,) resources reached
    in_pool: Array
    left: Array  # (resources,) capacity not given away yet
    weight: Array  # (resources,) flows still rising


def make_flows(slots: int, resources: int, width: int) -> Flows:
    """State for at most `slots` flows at a time."""

    def ints(n: int, fill: int = 0) -> np.ndarray:
        return np.full(n, fill, np.int64)

    def floats(n: int) -> np.ndarray:
        return np.zeros(n)

    def flags(n: int) -> np.ndarray:
        return np.zeros(n, np.bool_)

    free = np.arange(slots, dtype=np.int64)[::-1].copy()
    return Flows(
        ints(slots, -1), floats(slots), floats(slots), floats(slots), ints(slots), free, ints(1),
        ints(resources, -1), ints(slots * width, -1), ints(slots * width, -1), ints(resources), floats(resources),
        ints(resources), flags(resources), ints(slots), ints(2),
        ints(slots), flags(slots), floats(slots), ints(resources), flags(resources), floats(resources),
        floats(resources),
    )  # fmt: skip


def contended(p: Program, flows: Flows, resource: int) -> bool:
    return flows.load[resource] > p.capacity[resource] * (1 + SLACK)


def touch(flows: Flows, resource: int) -> None:
    if not flows.is_dirty[resource]:
        flows.is_dirty[resource] = True
        flows.dirty[flows.marks[0]] = resource
        flows.marks[0] += 1


def start_flow(p: Program, flows: Flows, width: int, message: int, time: float) -> None:
    """Put a message on its way; `rebalance` gives it a rate."""
    slot = flows.free[len(flows.free) - 1 - flows.used[0]]
    flows.used[0] += 1
    flows.message[slot], flows.remaining[slot] = message, p.message_bytes[message]
    flows.since[slot], flows.rate[slot] = time, 0.0
    flows.fresh[flows.marks[1]] = slot
    flows.marks[1] += 1
    route = p.message_route[message]
    for i in range(p.route_at[route], p.route_at[route + 1]):
        resource, entry = p.route_resources[i], slot * width + i - p.route_at[route]
        first = flows.head[resource]
        flows.after[entry], flows.before[entry], flows.head[resource] = first, -1, entry
        if first >= 0:
            flows.before[first] = entry
        flows.count[resource] += 1
        flows.load[resource] += p.message_limit[message] * p.route_weights[i]
        if contended(p, flows, resource):
            touch(flows, resource)


def end_flow(p: Program, flows: Flows, width: int, slot: int) -> int:
    """Take a flow off its resources; returns its message."""
    message = flows.message[slot]
    route = p.message_route[message]
    for i in range(p.route_at[route], p.route_at[route + 1]):
        resource, entry = p.route_resources[i], slot * width + i - p.route_at[route]
        if contended(p, flows, resource):
            touch(flows, resource)
        a, b = flows.before[entry], flows.after[entry]
        if a >= 0:
            flows.after[a] = b
        else:
            flows.head[resource] = b
        if b >= 0:
            flows.before[b] = a
        flows.count[resource] -= 1
        flows.load[resource] -= p.message_limit[message] * p.route_weights[i]
        if not flows.count[resource]:
            flows.load[resource] = 0.0
    flows.message[slot] = -1
    flows.version[slot] += 1
    flows.used[0] -= 1
    flows.free[len(flows.free) - 1 - flows.used[0]] = slot
    return message


def rebalance(p: Program, flows: Flows, width: int, time: float, events: Events) -> None:
    """New rates for all flows that the changes since the last call reach; their ends become events."""
    flows_in, pooled = 0, 0
    for i in range(flows.marks[1]):
        slot = flows.fresh[i]
        if not flows.in_group[slot] and flows.message[slot] >= 0:
            flows.in_group[slot] = True
            flows.group[flows_in] = slot
            flows_in += 1
    for i in range(flows.marks[0]):
        resource = flows.dirty[i]
        flows.is_dirty[resource] = False
        entry = flows.head[resource]
        while entry >= 0:
            slot = entry // width
            if not flows.in_group[slot]:
                flows.in_group[slot] = True
                flows.group[flows_in] = slot
                flows_in += 1
            entry = flows.after[entry]
    flows.marks[0] = flows.marks[1] = 0
    done = 0
    while done < flows_in:
        route = p.message_route[flows.message[flows.group[done]]]
        done += 1
        for i in range(p.route_at[route], p.route_at[route + 1]):
            resource = p.route_resources[i]
            if flows.in_pool[resource] or not contended(p, flows, resource):
                continue
            flows.in_pool[resource] = True
            flows.pool[pooled] = resource
            pooled += 1
            entry = flows.head[resource]
            while entry >= 0:
                slot = entry // width
                if not flows.in_group[slot]:
                    flows.in_group[slot] = True
                    flows.group[flows_in] = slot
                    flows_in += 1
                entry = flows.after[entry]
    fill(p, flows, flows_in, pooled)
    for i in range(flows_in):
        slot = flows.group[i]
        flows.in_group[slot] = False
        new, old = flows.target[slot], flows.rate[slot]
        if abs(new - old) > SLACK * old:
            flows.remaining[slot] = max(0.0, flows.remaining[slot] - old * (time - flows.since[slot]))
            flows.since[slot], flows.rate[slot] = time, new
            flows.version[slot] += 1
            push(events, time + flows.remaining[slot] / new, FLOW_ENDS, slot, flows.version[slot])
    for i in range(pooled):
        flows.in_pool[flows.pool[i]] = False


def fill(p: Program, flows: Flows, flows_in: int, pooled: int) -> None:
    """Max-min fair targets for the first `flows_in` flows of the group over the first `pooled` resources."""
    for i in range(pooled):
        resource = flows.pool[i]
        flows.left[resource], flows.weight[resource] = p.capacity[resource], 0.0
    for i in range(flows_in):
        slot = flows.group[i]
        flows.target[slot] = 0.0
        route = p.message_route[flows.message[slot]]
        for k in range(p.route_at[route], p.route_at[route + 1]):
            if flows.in_pool[p.route_resources[k]]:
                flows.weight[p.route_resources[k]] += p.route_weights[k]
    rising = flows_in
    while rising:
        share, limit = np.inf, np.inf
        for i in range(pooled):
            resource = flows.pool[i]
            if flows.weight[resource] > SLACK:
                share = min(share, flows.left[resource] / flows.weight[resource])
        for i in range(flows_in):
            slot = flows.group[i]
            if flows.target[slot] == 0.0:
                limit = min(limit, p.message_limit[flows.message[slot]])
        level = min(share, limit) * (1 + SLACK)
        # Resources that fill up now are marked before any is changed: freezing a flow lowers what is left elsewhere.
        for i in range(pooled):
            resource = flows.pool[i]
            if flows.weight[resource] > SLACK and flows.left[resource] / flows.weight[resource] <= level:
                flows.weight[resource] = -flows.weight[resource]
        for i in range(flows_in):
            slot = flows.group[i]
            if flows.target[slot] != 0.0:
                continue
            message = flows.message[slot]
            route = p.message_route[message]
            stays = p.message_limit[message] <= level
            for k in range(p.route_at[route], p.route_at[route + 1]):
                resource = p.route_resources[k]
                stays = stays or (flows.in_pool[resource] and flows.weight[resource] < 0)
            if not stays:
                continue
            rate = min(share, p.message_limit[message])
            flows.target[slot] = rate
            rising -= 1
            for k in range(p.route_at[route], p.route_at[route + 1]):
                resource = p.route_resources[k]
                if flows.in_pool[resource] and flows.weight[resource] > 0:
                    flows.weight[resource] -= p.route_weights[k]
                    flows.left[resource] = max(0.0, flows.left[resource] - rate * p.route_weights[k])
        for i in range(pooled):
            resource = flows.pool[i]
            if flows.weight[resource] < 0:
                flows.weight[resource] = 0.0
