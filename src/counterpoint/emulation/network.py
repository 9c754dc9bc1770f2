"""A topology made real: namespaces, veth pairs, rate limits and routes.

Rank r has the address 10.77.0.0 + r + 1 on its loopback device and on no link, so one address is reached over as
many links as the rank has peers. Links need no address resolution: both ends of a veth pair share one hardware
address. All addresses exist in the namespaces made here and nowhere else.
"""

from __future__ import annotations

from contextlib import suppress

from counterpoint.emulation.namespaces import Namespaces, Unsupported
from counterpoint.emulation.topology import Topology, Wire, forwarding

MTU = 9000
HEADERS = 52  # bytes of IPv4 and TCP (with timestamps) in a packet
FRAME = 14  # bytes of Ethernet around it; what the kernel counts against a rate
SEND_BUFFER = 524_288  # bytes that a connection may hold back
MOST_RANKS = 64


def address(rank: int) -> str:
    """The address of a rank in the namespaces."""
    return f"10.77.{(rank + 1) // 256}.{(rank + 1) % 256}"


def set_up(namespaces: Namespaces, topology: Topology) -> None:
    """Build the wires and routes of a topology in fresh namespaces (one per rank, and the fabric's)."""
    every = range(topology.ranks + 1)
    for index in every:
        namespaces.settings(index, _settings(index == topology.fabric))
        with suppress(Unsupported):  # kernels without IPv6 have nothing to switch off
            namespaces.settings(index, {"ipv6/conf/default/disable_ipv6": "1"})
    for rank in range(topology.ranks):
        lines = [
            "link set lo up",
            "address del 127.0.0.1/8 dev lo",
            f"address add {address(rank)}/32 dev lo",
        ]
        namespaces.batch(rank, "ip", lines)
    namespaces.batch(topology.fabric, "ip", [line for w in topology.wires for line in _links(namespaces, w)])
    for index in every:
        sending = [w for w in topology.wires if w.source == index]
        receiving = [w for w in topology.wires if w.target == index]
        up = [f"link set {w.name}o up" for w in sending] + [f"link set {w.name}i up" for w in receiving]
        namespaces.batch(index, "ip", up)
        namespaces.batch(index, "tc", [line for w in sending for line in _limits(w)])
    for rank in range(topology.ranks):
        namespaces.batch(rank, "ip", _routes_of_rank(topology, rank))
    namespaces.batch(topology.fabric, "ip", _routes_of_fabric(topology))


def _settings(forwards: bool) -> dict[str, str]:
    # Answers come back another way than requests went, so addresses must not be checked against the interface.
    values = {"ipv4/conf/all/rp_filter": "0", "ipv4/conf/default/rp_filter": "0"}
    if forwards:
        return {**values, "ipv4/ip_forward": "1"}
    return {
        **values,
        # A connection that was quiet while its ranks computed goes on at the rate it had.
        "ipv4/tcp_slow_start_after_idle": "0",
        "ipv4/tcp_no_metrics_save": "1",
        # A send ends when the last of it is under way, not when it is copied; and queues never overflow.
        "ipv4/tcp_wmem": f"4096 {SEND_BUFFER} {SEND_BUFFER}",
    }


def _links(namespaces: Namespaces, wire: Wire) -> list[str]:
    number = int(wire.name[1:])
    hardware = f"02:00:00:{number >> 16 & 255:02x}:{number >> 8 & 255:02x}:{number & 255:02x}"
    ends = [
        f"{name} netns {namespaces.path(index)} mtu {MTU} address {hardware} arp off"
        for name, index in ((wire.name + "o", wire.source), (wire.name + "i", wire.target))
    ]
    return [f"link add {ends[0]} type veth peer name {ends[1]}"]


def _limits(wire: Wire) -> list[str]:
    """A rate for the wire, an equal share of it guaranteed to every flow, the rest lent to those who can use it."""
    device = f"dev {wire.name}o"
    lines = [f"qdisc add {device} root handle 1: htb default 1"]
    lines.append(
        f"class add {device} parent 1: classid 1:1 htb {_rate('rate', wire.bytes_per_second)} quantum 9014"
    )
    share = wire.bytes_per_second / len(wire.flows)
    for i, flow in enumerate(wire.flows, 16):
        rates = f"{_rate('rate', min(share, flow.bytes_per_second))} {_rate('ceil', flow.bytes_per_second)}"
        queue = max(128_000, int(0.02 * flow.bytes_per_second))
        ends = f"match ip src {address(flow.source)} match ip dst {address(flow.destination)}"
        lines += [
            f"class add {device} parent 1:1 classid 1:{i:x} htb {rates} quantum 9014",
            f"qdisc add {device} parent 1:{i:x} bfifo limit {queue}",
            f"filter add {device} protocol ip parent 1: prio 1 u32 {ends} flowid 1:{i:x}",
        ]
    return lines


def _rate(kind: str, bytes_per_second: float) -> str:
    """A rate of payload as one of packets with their headers."""
    bits = 8 * bytes_per_second * (MTU + FRAME) / (MTU - HEADERS)
    burst = "burst" if kind == "rate" else "cburst"
    return f"{kind} {max(8, round(bits))}bit {burst} 18k"


def _routes_of_rank(topology: Topology, rank: int) -> list[str]:
    lines = []
    for (source, destination), way in topology.ways.items():
        if source == rank:
            first = topology.wires[way[0]].name
            lines.append(f"route add {address(destination)}/32 dev {first}o src {address(rank)}")
    return lines


def _routes_of_fabric(topology: Topology) -> list[str]:
    lines, table = [], 1000
    for index, wire in enumerate(topology.wires):
        if wire.target != topology.fabric:
            continue
        usual, exceptions = forwarding(topology, index)
        table += 1
        lines.append(f"rule add iif {wire.name}i lookup {table} priority 2000")
        for destination, after in usual.items():
            lines.append(
                f"route add {address(destination)}/32 dev {topology.wires[after].name}o table {table}"
            )
        for (source, destination), after in exceptions.items():
            table += 1
            ends = f"from {address(source)} to {address(destination)}"
            lines.append(f"rule add iif {wire.name}i {ends} lookup {table} priority 1000")
            lines.append(
                f"route add {address(destination)}/32 dev {topology.wires[after].name}o table {table}"
            )
    return lines
