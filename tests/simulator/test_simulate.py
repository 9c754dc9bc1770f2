"""Cases small enough to compute by hand: links carry 1 GB/s (1 MB per ms) after 1 ms of latency."""

from __future__ import annotations

import pytest

from counterpoint.schedule.builder import Builder
from counterpoint.schedule.check import ScheduleError
from counterpoint.schedule.timeline import MemoryEvent
from counterpoint.simulator.simulate import simulate
from simulator.by_hand import MS, Busy, cluster, fan_out, idle, megabytes, receiver, schedules, sender, spans


def stops(timeline, rank: int, kind: str) -> list[float]:
    return [pytest.approx(s.stop / MS) for s in spans(timeline, rank, kind)]


def test_a_message_waits_for_its_value_and_takes_latency_and_bytes():
    def write(b: Builder) -> dict:
        made = b.compute(Busy(5, megabytes(10)), b.input("a", megabytes(1)))
        b.send(made, 1, "x")
        return {}

    timeline = simulate(schedules(write, receiver((0, 10))), cluster())
    (send,), (recv,) = spans(timeline, 0, "send"), spans(timeline, 1, "recv")
    assert (send.start, send.stop) == (pytest.approx(5 * MS), pytest.approx(16 * MS))
    assert (recv.start, recv.stop) == (0.0, send.stop), "a receive starts when it is posted"
    assert (send.peer, send.nbytes, recv.peer, recv.nbytes) == (1, 10_000_000, 0, 10_000_000)
    assert timeline.source == "simulated"


@pytest.mark.parametrize("busy", [20, 3])
def test_communication_hides_behind_computation(busy: float):
    def write(b: Builder) -> dict:
        b.send([b.input("a", megabytes(10))], 1, "x")
        return {"c": b.compute(Busy(busy, megabytes(1)))[0]}

    timeline = simulate(schedules(write, receiver((0, 10))), cluster())
    assert timeline.seconds == pytest.approx(max(busy, 11) * MS)
    assert timeline.categories(0)["hidden"] == pytest.approx(min(busy, 11) * MS)


@pytest.mark.parametrize(("link", "expected"), [("switch", [21, 41]), ("mesh", [11, 31]), ("bus", [21, 41])])
def test_flows_share_what_they_have_in_common(link: str, expected: list[float]):
    def write(b: Builder) -> dict:
        one, two = b.recv([megabytes(10)], 1, "x"), b.recv([megabytes(30)], 2, "y")
        return {"one": one[0], "two": two[0]}

    written = schedules(write, sender(0, 10), sender(0, 30, channel="y"))
    timeline = simulate(written, cluster(link))
    assert [stops(timeline, 1, "send")[0], stops(timeline, 2, "send")[0]] == expected


@pytest.mark.parametrize(("link", "expected"), [("switch", 11), ("bus", 21)])
def test_the_two_directions_of_a_port_do_not_disturb_each_other(link: str, expected: float):
    def both(other: int):
        def write(b: Builder) -> dict:
            b.send([b.input("a", megabytes(10))], other, "x")
            return {"b": b.recv([megabytes(10)], other, "x")[0]}

        return write

    assert simulate(schedules(both(1), both(0)), cluster(link)).seconds == pytest.approx(expected * MS)


def test_a_flow_slower_than_its_share_leaves_the_rest_to_others():
    """Port out of rank 0: 1 GB/s; the pair limit of 0.4 GB/s binds neither of three flows, then both of two."""
    level = {"attained": "0.4 GB/s"}
    written = schedules(
        fan_out(10, 1, 2, 3),
        *(receiver((0, 10), channel=f"x{r}") for r in (1, 2, 3)),
    )
    assert simulate(written, cluster(**level)).seconds == pytest.approx(31 * MS)  # 1 + 10 / (1 / 3)
    two = schedules(
        fan_out(10, 1, 2),
        *(receiver((0, 10), channel=f"x{r}") for r in (1, 2)),
    )
    assert simulate(two, cluster(**level)).seconds == pytest.approx(26 * MS)  # 1 + 10 / 0.4


@pytest.mark.parametrize(("depth", "expected"), [(2, [11, 22]), (1, [11, 52])])
def test_a_receive_is_posted_when_its_channel_has_a_free_buffer(depth: int, expected: list[float]):
    def write(b: Builder) -> dict:
        b.depth("x", depth)
        one, two = b.recv([megabytes(10)], 0, "x"), b.recv([megabytes(10)], 0, "x")
        first = b.compute(Busy(30, megabytes(1)), *one)[0]
        return {"c": b.compute(Busy(1, megabytes(1)), first, *two)[0]}

    timeline = simulate(schedules(sender(1, 10, 10), write), cluster())
    assert stops(timeline, 1, "recv") == expected
    posted = [s.start / MS for s in spans(timeline, 1, "recv")]
    assert posted == [0, pytest.approx(0 if depth == 2 else 41)]


def test_a_collective_is_a_message_to_everybody_or_what_was_measured():
    def everyone(rank: int):
        def write(b: Builder) -> dict:
            others = [r for r in range(3) if r != rank]
            a = b.input("a", megabytes(10))
            got = b.collective(
                "all_gather", "c", {r: [a] for r in others}, {r: [(f"b{r}", megabytes(10))] for r in others}
            )
            return {f"b{r}": got[r][0] for r in others}

        return write

    written = schedules(*map(everyone, range(3)))
    direct = simulate(written, cluster())
    assert direct.seconds == pytest.approx(21 * MS)  # two flows leave every port
    assert direct.bytes_by_link() == {(a, b): 10_000_000 for a in range(3) for b in range(3) if a != b}
    tables = {"collectives": {"all_gather": {3: {"20 MB": "5 GB/s"}}}}
    assert simulate(written, cluster(**tables), collectives="measured").seconds == pytest.approx(4 * MS)
    assert simulate(written, cluster(), collectives="measured").seconds == pytest.approx(21 * MS)


def test_copies_to_a_tier_share_the_way_there():
    def write(b: Builder) -> dict:
        a, c = b.input("a", megabytes(10)), b.input("c", megabytes(10))
        up = b.copy(a, "host", "up"), b.copy(c, "host", "up2")
        return {"back": b.copy(up[0], "device", "down"), "c": up[1]}

    timeline = simulate(schedules(write), cluster())
    assert stops(timeline, 0, "copy") == [10, 10, 15]


def test_live_bytes_count_a_receive_from_its_posting_and_a_result_from_its_end():
    def write(b: Builder) -> dict:
        b.send([b.input("a", megabytes(1))], 1, "x")
        return {}

    def other(b: Builder) -> dict:
        kept = b.input("k", megabytes(3))
        got = b.recv([megabytes(1)], 0, "x")
        made = b.compute(Busy(5, megabytes(2)), kept, *got)
        return {"end": b.compute(Busy(1, megabytes(4)), *made)[0]}

    timeline = simulate(schedules(write, other), cluster())
    steps = [(0, 3), (0, 4), (7, 6), (7, 5), (8, 9), (8, 7)]
    expected = [MemoryEvent(1, pytest.approx(t * MS), n * 1_000_000) for t, n in steps]
    assert [m for m in timeline.memory if m.rank == 1] == expected


def test_memory_that_does_not_fit_names_rank_time_and_values():
    def write(b: Builder) -> dict:
        made = b.compute(Busy(5, megabytes(6)), b.input("small", megabytes(1)), names=["large"])
        return {"end": b.compute(Busy(5, megabytes(6)), *made, names=["larger"])[0], "large": made[0]}

    with pytest.raises(
        ValueError, match=r"rank 1 runs out of memory after 0.01 s at step 1 .*13 MB"
    ) as caught:
        simulate(schedules(idle, write), cluster(memory="10 MB"))
    assert "large (6 MB), larger (6 MB), small (1 MB)" in str(caught.value)
    assert "d has 10 MB" in str(caught.value)
    with pytest.raises(ValueError, match="rank 0 runs out of memory before its first step"):
        simulate(schedules(sender(1, 20), receiver((0, 20))), cluster(memory="10 MB"))


def test_more_ranks_than_the_cluster_has():
    with pytest.raises(ValueError, match=r"for 5 ranks, but cluster by-hand has 4"):
        simulate(schedules(*[idle] * 5), cluster())


@pytest.mark.parametrize("placement", [[0], [0, 0], [0, 4]])
def test_a_placement_must_name_different_ranks(placement: list[int]):
    with pytest.raises(ValueError, match=r"give 2 different ranks between 0 and 3"):
        simulate(schedules(idle, idle), cluster(), placement=placement)


def test_a_placement_moves_ranks_to_other_devices():
    links = {"forwarding": True, "latency": "1 ms"}
    pairs = [{"between": [0, 1], "bandwidth": "1 GB/s"}, {"between": [1, 2], "bandwidth": "2 GB/s"}]
    pairs.append({"between": [2, 3], "bandwidth": "1 GB/s"})
    line = cluster("pairs", bandwidth=None, links=pairs, **links)
    written = schedules(sender(1, 10), receiver((0, 10)))
    assert simulate(written, line).seconds == pytest.approx(11 * MS)
    assert simulate(written, line, placement=[1, 2]).seconds == pytest.approx(6 * MS)
    assert simulate(written, line, placement=[0, 3]).seconds == pytest.approx(13 * MS)


def test_ranks_that_wait_for_each_other_are_named():
    def write(other: int):
        def steps(b: Builder) -> dict:
            got = b.recv([megabytes(1)], other, "x")
            b.send(got, other, "x")
            return {}

        return steps

    with pytest.raises(ScheduleError, match=r"deadlock: rank 0 waits at step 0 .*; rank 1 waits at step 0"):
        simulate(schedules(write(1), write(0)), cluster())


def test_a_message_without_counterpart_is_named():
    with pytest.raises(ScheduleError, match=r"rank 0.* sends to rank 1, which never receives it"):
        simulate(schedules(sender(1, 1), idle), cluster())
