"""Timelines to draw: a TokenRing forward and backward pass as an event calculation, with realistic overlap.

Each directed link carries one transfer at a time at a fixed rate; a rank computes one block at a time.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from counterpoint.schedule.timeline import MemoryEvent, Span, Timeline


@pytest.fixture(scope="session")
def tokenring() -> Callable[..., Timeline]:
    return tokenring_timeline


@pytest.fixture(scope="session")
def degenerate() -> dict[str, Timeline]:
    instant = Span(0, "compute", "compute", "instant", 3.0, 3.0)
    silent = [
        Span(0, "q.send", "send", "q", 0.0, 1e-3, peer=1),
        Span(1, "q.recv", "recv", "q", 0.0, 1e-3, peer=0),
    ]
    gathered = Span(0, "gather", "collective", "k", 0.0, 2e-3, nbytes=12, links=((1, 4), (2, 8)))
    return {
        "empty": Timeline(),
        "one span": Timeline(spans=[Span(0, "compute", "compute", "attend", 5.0, 6.0, flops=10)]),
        "no time": Timeline(spans=[instant]),
        "no bytes": Timeline(spans=silent, memory=[MemoryEvent(0, 0.0, 0)]),
        "memory only": Timeline(memory=[MemoryEvent(2, 1.0, 100)]),
        "a send without its receive": Timeline(spans=silent[:1]),
        "a collective": Timeline(spans=[gathered]),
        "names that look like something else": Timeline(
            spans=[Span(0, "x<y>.send", "send", "$a_b$ </script>", 0.0, 1e-3, peer=1, nbytes=7)],
            meta={"<i>": "</table>"},
        ),
    }


def tokenring_timeline(
    world_size: int = 4,
    *,
    layers: int = 1,
    tokens: int = 8192,
    heads: int = 8,
    head_dim: int = 64,
    flops_per_second: float = 120e9,
    bytes_per_second: float = 220e6,
    jitter: float = 0.0,
    seed: int = 0,
    source: str = "simulated",
) -> Timeline:
    rng = random.Random(seed)
    local = tokens // world_size
    q_bytes = heads * local * head_dim * 4
    lse_bytes = heads * local * 4
    spans: list[Span] = []
    changes: list[tuple[float, int, int]] = []
    ranks = range(world_size)
    now = [rng.random() * jitter * 1e-3 for _ in ranks]
    link_free: dict[tuple[int, int], float] = {}

    def noisy(seconds: float) -> float:
        return seconds * (1 + jitter * rng.random())

    def compute(rank: int, name: str, ready: float, flops: int) -> float:
        start = max(now[rank], ready)
        now[rank] = start + noisy(flops / flops_per_second)
        spans.append(Span(rank, "compute", "compute", name, start, now[rank], flops=flops))
        return now[rank]

    def transfer(a: int, b: int, channel: str, name: str, ready: float, posted: float, nbytes: int) -> float:
        start = max(ready, link_free.get((a, b), 0.0))
        stop = start + 50e-6 + noisy(nbytes / bytes_per_second)
        link_free[a, b] = stop
        spans.append(Span(a, f"{channel}.send", "send", name, start, stop, peer=b, nbytes=nbytes))
        spans.append(
            Span(b, f"{channel}.recv", "recv", name, min(posted, start), stop, peer=a, nbytes=nbytes)
        )
        remember(b, start, nbytes)
        remember(b, stop + 1e-3, -nbytes)
        return stop

    def remember(rank: int, time: float, change: int) -> None:
        changes.append((time, rank, change))

    def one_pass(packet: str, back: str, packet_bytes: int, back_bytes: int, flops: int, verb: str) -> None:
        arrived = [list(now)]
        partials: list[list[tuple[float, int]]] = [[] for _ in ranks]
        for step in ranks:
            following = [0.0 for _ in ranks]
            if step + 1 < world_size:
                for r in ranks:
                    name = f"{packet}{(r - step) % world_size}"
                    peer = (r + 1) % world_size
                    ready, posted = arrived[step][r], arrived[step][peer]
                    following[peer] = transfer(r, peer, "q", name, ready, posted, packet_bytes)
                arrived.append(following)
            for r in ranks:
                owner = (r - step) % world_size
                done = compute(r, f"{verb} {packet}{owner}", arrived[step][r], flops)
                if owner != r:
                    stop = transfer(r, owner, back, f"{back}{owner}", done, now[owner], back_bytes)
                    partials[owner].append((stop, r))
            for r in ranks:
                for stop, _ in [p for p in partials[r] if p[0] <= now[r]]:
                    compute(r, "merge", stop, back_bytes * 4)
                partials[r] = [p for p in partials[r] if p[0] > now[r]]
        for r in ranks:
            for stop, _ in partials[r]:
                compute(r, "merge", stop, back_bytes * 4)

    block = 4 * local * local * heads * head_dim // 2
    for _ in range(layers):
        one_pass("q", "out", q_bytes, q_bytes + lse_bytes, block, "attend")
    for _ in range(layers):
        one_pass("Q", "dq", 2 * q_bytes + 2 * lse_bytes, q_bytes, block * 5 // 2, "backward")
    live = [4 * q_bytes for _ in ranks]
    memory = [MemoryEvent(r, min(s.start for s in spans), live[r]) for r in ranks]
    for time, rank, change in sorted(changes):
        live[rank] += change
        memory.append(MemoryEvent(rank, time, live[rank]))
    meta = {"strategy": "tokenring", "tokens": tokens, "heads": heads, "head_dim": head_dim}
    return Timeline(source, sorted(spans, key=lambda s: s.start), memory, meta)
