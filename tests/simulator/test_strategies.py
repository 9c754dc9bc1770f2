"""Properties that hold for the simulation of every strategy, and the published figures of TokenRing."""

from __future__ import annotations

import time
from collections import defaultdict
from itertools import pairwise

import pytest

from counterpoint.cluster.presets import find_cluster
from counterpoint.schedule.schedule import Recv, Schedule
from counterpoint.schedule.timeline import Timeline
from counterpoint.simulator import engine
from counterpoint.simulator.fold import fold
from counterpoint.simulator.simulate import simulate
from counterpoint.strategies.sequence.attention import (
    AttentionProblem,
    AttentionShape,
    backward_schedule,
    forward_schedule,
    parse_choices,
)
from counterpoint.strategies.sequence.layout import SequenceLayout
from simulator.by_hand import cluster

NAMES = (
    "ring",
    "bidirectional_ring",
    "tokenring",
    "tokenring(packets=2, relay=false)",
    "allgather",
    "ulysses",
    "rsa",
    "ring/tokenring",
    "ring/ulysses",
    "allgather/ring",
)


def problem(
    name: str,
    mesh=(4,),
    tokens: int = 2000,
    heads: int = 8,
    kv_heads: int = 4,
    causal: bool = True,
    layout="zigzag",
) -> AttentionProblem:
    world_size = 1
    for size in mesh:
        world_size *= size
    shape = AttentionShape(1, heads, kv_heads, 128, "bfloat16")
    choices = parse_choices(name)
    return AttentionProblem(shape, SequenceLayout(layout, tokens, world_size), mesh, choices, choices, causal)


def both_passes(given: AttentionProblem) -> list[list[Schedule]]:
    ranks = range(given.layout.world_size)
    return [[make(given, rank) for rank in ranks] for make in (forward_schedule, backward_schedule)]


def mesh_for(name: str) -> tuple[int, ...]:
    return (2, 2) if "/" in name else (4,)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preset", ["a10x4-pcie", "dgx-h100", "pcie-consumer"])
def test_bytes_steps_and_live_bytes_are_those_of_the_schedules(name: str, preset: str):
    for schedules in both_passes(problem(name, mesh_for(name), tokens=401)):
        timeline = simulate(schedules, find_cluster(preset))
        sent = {(s.rank, to): n for s in schedules for to, n in s.sent_bytes().items()}
        assert timeline.bytes_by_link() == sent
        received = defaultdict(int)
        for span in timeline.spans:
            if span.kind == "recv":
                received[span.peer, span.rank] += span.nbytes
        alone = not any(
            span.links for span in timeline.spans
        )  # what collectives bring has no spans of its own
        assert all(sent[link] == n if alone else sent[link] >= n for link, n in received.items())
        for schedule in schedules:
            assert live_bytes(schedule, timeline) == last_at_each_time(schedule.rank, timeline)


def last_at_each_time(rank: int, timeline: Timeline) -> dict[float, int]:
    """Live bytes after everything that happened at a moment; moments that change nothing left out."""
    return without_repetitions({m.time: m.live_bytes for m in timeline.memory if m.rank == rank})


def live_bytes(schedule: Schedule, timeline: Timeline) -> dict[float, int]:
    """The same by the definition of liveness, from the times of the steps alone."""
    by_stream = defaultdict(list)
    for span in timeline.spans:
        if span.rank == schedule.rank:
            by_stream[span.stream].append(span)
    when = {}
    for stream, indices in schedule.streams.items():
        assert len(by_stream[stream]) == len(indices)
        when.update(zip(indices, sorted(by_stream[stream], key=lambda s: (s.stop, s.start)), strict=True))
    root = schedule.memory.root
    born, died = {v.name: 0.0 for v in schedule.inputs}, {}
    for i, step in enumerate(schedule.steps):
        for value in step.writes:
            if root[value.name] == value.name:
                born[value.name] = when[i].start if isinstance(step, Recv) else when[i].stop
                died[value.name] = when[i].stop
        for name in step.reads:
            died[root[name]] = max(died.get(root[name], 0.0), when[i].stop)
    kept = {root[n] for n in (*(v.name for v in schedule.inputs), *schedule.outputs.values())}
    changes = defaultdict(int)
    for name, time_born in born.items():
        changes[time_born] += schedule.values[name].nbytes
        if name not in kept:
            changes[died[name]] -= schedule.values[name].nbytes
    live, curve = 0, {}
    for moment, change in sorted({0.0: 0, **changes}.items()):
        live += change
        curve[moment] = live
    return without_repetitions(curve)


def without_repetitions(curve: dict[float, int]) -> dict[float, int]:
    kept, before = {}, None
    for moment, live in curve.items():
        if live != before:
            kept[moment], before = live, live
    return kept


@pytest.mark.parametrize("name", ["tokenring", "allgather", "ring/tokenring"])
def test_the_same_schedules_give_the_same_timeline_compiled_or_not(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    schedules = both_passes(problem(name, mesh_for(name), tokens=4003))[1]
    cluster = find_cluster("a10x4-pcie")
    first, again = simulate(schedules, cluster), simulate(schedules, cluster)
    assert (first.spans, first.memory) == (again.spans, again.memory)
    pytest.importorskip("numba")
    monkeypatch.setattr(engine, "WORTH_LOADING", 0)
    monkeypatch.setattr(engine, "WORTH_COMPILING", 0)
    compiled = simulate(schedules, cluster)
    assert (first.spans, first.memory) == (compiled.spans, compiled.memory)


@pytest.mark.parametrize("name", ["ring", "tokenring", "bidirectional_ring"])
def test_ranks_that_are_alike_fold_into_one(name: str):
    given, cluster = problem(name, (8,), 4096, 32, 8, causal=False), find_cluster("dgx-h100")
    for make in (forward_schedule, backward_schedule):
        schedules, symmetry = fold(lambda rank, make=make: make(given, rank), (8,))
        assert len(schedules) == 1
        folded = simulate(schedules, cluster, symmetry=symmetry)
        whole = simulate([make(given, rank) for rank in range(8)], cluster)
        assert folded.seconds == pytest.approx(whole.seconds, rel=1e-12)
        assert folded.peak_bytes(0) == whole.peak_bytes(0)
        assert [s for s in whole.spans if s.rank == 0] == [s for s in folded.spans if s.rank == 0]


def test_a_mesh_of_nodes_folds_to_one_rank_that_shares_its_links_as_before():
    given, cluster = problem("ring/tokenring", (4, 8), 32 * 256, causal=False), find_cluster("dgx-h100-pod")
    for make in (forward_schedule, backward_schedule):
        schedules, symmetry = fold(lambda rank, make=make: make(given, rank), (4, 8))
        assert len(schedules) == 1
        folded = simulate(schedules, cluster, symmetry=symmetry)
        assert folded.seconds == simulate([make(given, rank) for rank in range(32)], cluster).seconds


@pytest.mark.parametrize("name", ["ring/tokenring", "tokenring/ring"])
def test_a_cluster_with_less_symmetry_folds_less(name: str):
    """Nodes at the border of an island have a longer way to the next one."""
    level = {"bandwidth": "10 GB/s", "latency": "2 us"}
    levels = [
        {**level, "level": "node", "count": 2, "link": "switch"},
        {**level, "level": "island", "count": 2, "link": "switch", "attained": "8 GB/s"},
        {**level, "level": "cluster", "count": 4, "link": "switch", "latency": "9 us", "attained": "5 GB/s"},
    ]
    given, islands = problem(name, (8, 2), 16 * 64, causal=False), cluster(levels=levels)
    for make in (forward_schedule, backward_schedule):
        schedules, symmetry = fold(lambda rank, make=make: make(given, rank), (8, 2))
        assert len(schedules) == 1
        folded = simulate(schedules, islands, symmetry=symmetry)
        assert folded.meta["folded"]["simulated_ranks"] == [0, 2]
        whole = simulate([make(given, rank) for rank in range(16)], islands)
        assert folded.seconds == pytest.approx(whole.seconds, rel=1e-9)
        assert set(folded.ranks) <= {0, 2}
        for rank in folded.ranks:
            ours, theirs = ([s for s in t.spans if s.rank == rank] for t in (folded, whole))
            assert [(s.stream, s.peer, s.nbytes) for s in ours] == [
                (s.stream, s.peer, s.nbytes) for s in theirs
            ]
            assert [s.stop for s in ours] == pytest.approx([s.stop for s in theirs], rel=1e-9)
            assert folded.peak_bytes(rank) == whole.peak_bytes(rank)


def test_ranks_that_differ_are_not_folded():
    given = problem("tokenring", (4,))
    schedules, symmetry = fold(lambda rank: forward_schedule(given, rank), (4,))
    assert (len(schedules), symmetry.folded) == (4, False)


def a10(name: str, tokens: int, kv_heads: int = 32) -> Timeline:
    given = problem(name, tokens=tokens, heads=32, kv_heads=kv_heads)
    return simulate([forward_schedule(given, rank) for rank in range(4)], find_cluster("a10x4-pcie"))


def attention_starts(timeline: Timeline) -> list[list[float]]:
    """When every rank starts the attention of every step: [step][rank]."""
    ranks = [
        [s.start for s in timeline.spans if s.rank == r and s.name.startswith("attend")] for r in range(4)
    ]
    return [list(step) for step in zip(*ranks, strict=True)]


def test_tokenring_and_ring_take_the_published_times():
    """4x A10, 24,000 tokens, 32 heads of 128, causal: TokenRing 3.5, 3.5, 4.6 ms; Ring Attention 7.6 ms.

    From one step's attention to the next one's; TokenRing averaged over ranks, Ring at the pace of the slowest rank
    (half of the ranks get their first block over the faster link) and on average over ranks and steps.
    """
    steps = attention_starts(a10("tokenring", 24_000))
    means = [sum(b) / 4 - sum(a) / 4 for a, b in pairwise(steps)]
    assert means == pytest.approx([3.5e-3, 3.5e-3, 4.6e-3], rel=0.1)
    steps = attention_starts(a10("ring", 24_000))
    assert [max(b) - max(a) for a, b in pairwise(steps)] == pytest.approx([7.6e-3] * 3, rel=0.1)
    assert sum(b - a for a, b in zip(steps[0], steps[-1], strict=True)) / 12 == pytest.approx(7.6e-3, rel=0.1)


def test_the_advantage_of_tokenring_vanishes_near_55_000_tokens():
    """Up to there a step of Ring waits for K and V; beyond, steps of both are as long as the computation."""

    def slowest_step(name: str, tokens: int) -> float:
        return max(max(b) - max(a) for a, b in pairwise(attention_starts(a10(name, tokens))))

    def exposed(tokens: int) -> float:
        timeline = a10("ring", tokens)
        return timeline.categories(0)["exposed"] / timeline.seconds

    assert slowest_step("ring", 24_000) > 1.5 * slowest_step("tokenring", 24_000)
    assert exposed(40_000) > 0.1
    assert exposed(50_000) > 0.02
    assert exposed(56_000) < 0.001
    assert slowest_step("ring", 60_000) == pytest.approx(slowest_step("tokenring", 60_000), rel=0.01)


def test_with_few_key_value_heads_ring_beats_tokenring():
    assert a10("ring", 24_000, kv_heads=8).seconds < a10("tokenring", 24_000, kv_heads=8).seconds


def test_time_grows_linearly_with_the_number_of_steps():
    cluster = find_cluster("a10x4-pcie")

    def seconds(packets: int) -> tuple[int, float]:
        given = problem(f"tokenring(packets={packets})", heads=64, kv_heads=64)
        schedules = [forward_schedule(given, rank) for rank in range(4)]
        best = float("inf")
        for _ in range(3):
            started = time.process_time()
            simulate(schedules, cluster)
            best = min(best, time.process_time() - started)
        return sum(len(s.steps) for s in schedules), best

    (few, short), (many, long) = seconds(8), seconds(64)
    assert many > 6 * few
    assert long / many < 2.5 * short / few


@pytest.mark.parametrize(("way", "least"), [("forward", 1.35), ("backward", 2.3), ("both", 2.0)])
def test_packets_carry_tokenring_past_ring_where_links_bind(way, least):
    """4x A10, 8,000 tokens, causal: both directions work, and the results of two steps are on their way at a time."""

    def seconds(name: str) -> float:
        given = problem(name, tokens=8_000, heads=32, kv_heads=32)
        writes = {"forward": [forward_schedule], "backward": [backward_schedule]}
        return sum(
            simulate([write(given, rank) for rank in range(4)], find_cluster("a10x4-pcie")).seconds
            for write in writes.get(way, [forward_schedule, backward_schedule])
        )

    assert seconds("ring") > least * seconds("tokenring(packets=4)")
