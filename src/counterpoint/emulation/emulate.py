"""Runs attention on a scale model of a cluster, and sets what is measured beside what is simulated."""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

from counterpoint.cluster.cluster import Cluster
from counterpoint.emulation import network
from counterpoint.emulation.namespaces import Namespaces
from counterpoint.emulation.result import Emulation, How, PassResult, attention_steps
from counterpoint.emulation.scale import (
    LEAST_SECONDS,
    PASS_SECONDS,
    Scale,
    bytes_by_pair,
    choose_rates,
    pair_rates,
    same_steps,
    scaled_cluster,
    shrunk,
    step_seconds,
)
from counterpoint.emulation.topology import build_topology
from counterpoint.emulation.worker import Job, Pass
from counterpoint.schedule.schedule import Schedule
from counterpoint.schedule.timeline import Timeline
from counterpoint.simulator.simulate import simulate
from counterpoint.strategies.sequence.attention import AttentionProblem, backward_schedule, forward_schedule


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turns stop signals into SystemExit, so that everything is taken down on the way out; a second one is ignored."""
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopping = False

    def stop(number: int, _: Any) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            raise SystemExit(128 + number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    old = {n: signal.signal(n, stop) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        stopping = True
        for number, handler in old.items():
            signal.signal(number, handler)


@_stoppable()
def emulate(
    cluster: Cluster,
    problem: AttentionProblem,
    *,
    passes: Sequence[Pass] = ("forward",),
    compute: How = "timed",
    slowdown: float | None = None,
    repetitions: int = 3,
    environ: Mapping[str, str],
    say: Callable[[str], None] = lambda _: None,
) -> Emulation:
    """Run a problem on a scale model of the first ranks of a cluster, and simulate both.

    slowdown: how many times slower than the cluster (default: as this machine can). environ: for the workers.

    Raises:
        ValueError: more ranks than the cluster has or the scale model takes, a slowdown this machine cannot follow,
            a cluster without a figure that is needed; Unsupported (a ValueError): no rights or no kernel support.
        WorkerFailure: a rank failed.
    """
    world_size = problem.layout.world_size
    cluster = cluster.subset(world_size)
    if not 2 <= world_size <= network.MOST_RANKS:
        raise ValueError(f"a scale model has 2 to {network.MOST_RANKS} ranks; {world_size} were asked for")
    Namespaces(1).close()  # before anything takes time
    target: dict[Pass, list[Schedule]] = {which: _schedules(problem, which) for which in passes}
    real = {which: simulate(target[which], cluster) for which in passes}
    everything = [s for which in passes for s in target[which]]
    longest = max(t.seconds for t in real.values())
    seconds: dict[Pass, list[list[float]]] = {}
    if compute == "timed":
        small, scale = _timed_scale(cluster, problem, passes, target, everything, longest, slowdown)
        seconds = {
            which: [[t * scale.slowdown for t in step_seconds(cluster, s)] for s in target[which]]
            for which in passes
        }
    else:
        from counterpoint.emulation.real import real_scale

        say("measuring how fast this machine computes")
        small, scale = real_scale(cluster, problem, passes, target, longest, slowdown)
    schedules = {which: _schedules(small, which) for which in passes}
    rates = {pair: rate / scale.rates for pair, rate in pair_rates(cluster, everything).items()}
    model = scaled_cluster(cluster, scale, 0.0)
    topology = build_topology(model, rates)
    say(f"building {world_size} namespaces and {len(topology.wires)} links")
    with tempfile.TemporaryDirectory(prefix="counterpoint-") as directory:
        with Namespaces(world_size + 1) as namespaces:
            network.set_up(namespaces, topology)
            job = Job(
                small,
                tuple(passes),
                tuple(namespaces.path(rank) for rank in range(world_size)),
                seconds,
                repetitions,
                directory,
                timeout=60.0 + 10 * longest * scale.slowdown,
            )
            say(f"running {world_size} ranks")
            _launch(job, environ)
        latency = _latency(job)
        if compute == "real":
            seconds = {
                which: [json.loads(job.seconds_file(which, rank).read_text()) for rank in range(world_size)]
                for which in passes
            }
        model = scaled_cluster(cluster, scale, latency)
        results = tuple(
            _result(job, which, schedules[which], seconds[which], target[which], model, real[which], scale)
            for which in passes
        )
        difference = None
        if compute == "real":
            from counterpoint.emulation.real import worst_difference

            difference = worst_difference(job)
    return Emulation(
        cluster, problem, small, compute, scale, latency, results, len(topology.wires), difference
    )


def _timed_scale(
    cluster: Cluster,
    problem: AttentionProblem,
    passes: Sequence[Pass],
    target: Mapping[Pass, list[Schedule]],
    everything: list[Schedule],
    longest: float,
    slowdown: float | None,
) -> tuple[AttentionProblem, Scale]:
    """A shorter sequence and a slowdown that together bring the rates to what this machine carries."""
    rates = choose_rates(cluster, everything, longest)
    wanted = slowdown or min(rates, PASS_SECONDS / longest)
    small = shrunk(problem, max(1.0, rates / wanted))
    if any(not same_steps(target[which], _schedules(small, which)) for which in passes):
        small = problem
    sent = sum(sum(bytes_by_pair(target[which]).values()) for which in passes)
    sent_small = sum(sum(bytes_by_pair(_schedules(small, which)).values()) for which in passes)
    shrink = sent / sent_small if sent_small else 1.0
    scale = Scale(slowdown or rates / shrink, shrink)
    if longest * scale.slowdown < LEAST_SECONDS or scale.rates < rates / 4:
        least = max(LEAST_SECONDS / longest, rates / shrink)
        raise ValueError(
            f"with a factor of {scale.slowdown:.3g} a pass takes {1e3 * longest * scale.slowdown:.3g} ms, too fast for "
            f"this machine to imitate; use a factor of {least:.3g} or more"
        )
    return small, scale


def _schedules(problem: AttentionProblem, which: Pass) -> list[Schedule]:
    write = forward_schedule if which == "forward" else backward_schedule
    return [write(problem, rank) for rank in range(problem.layout.world_size)]


def _launch(job: Job, environ: Mapping[str, str]) -> None:
    from counterpoint.training.launch import launch

    # the only address of a rank's loopback device is the one under which its peers know it
    environ = {**environ, "GLOO_SOCKET_IFNAME": "lo"}
    arguments = ["-m", "counterpoint", "emulate-worker", str(job.write())]
    code = launch(arguments, job.problem.layout.world_size, environ)
    if code:
        raise SystemExit(code)


def _latency(job: Job) -> float:
    """Median one-way latency (s) over all pairs of ranks."""
    found: list[float] = []
    for rank in range(job.problem.layout.world_size):
        found += json.loads(job.latency_file(rank).read_text()).values()
    return median(found)


def _result(
    job: Job,
    which: Pass,
    schedules: list[Schedule],
    seconds: list[list[float]],
    target: list[Schedule],
    model: Cluster,
    real: Timeline,
    scale: Scale,
) -> PassResult:
    from counterpoint.emulation.held import hold

    held = [hold(s, t) for s, t in zip(schedules, seconds, strict=True)]
    simulated = simulate(held, model)
    ranks = range(job.problem.layout.world_size)
    runs = [
        Timeline.merge(Timeline.read(job.timeline_file(which, repetition, rank)) for rank in ranks).shifted()
        for repetition in range(1, job.repetitions + 1)
    ]
    runs.sort(key=lambda run: run.seconds)
    middle = runs[len(runs) // 2]
    middle.meta = {
        "schedule": schedules[0].name,
        "slowdown": scale.slowdown,
        "bytes divided by": scale.shrink,
        "tokens": job.problem.layout.tokens,
    }
    sent = middle.bytes_by_link()
    assert sent == simulated.bytes_by_link(), "measured and simulated bytes differ"
    return PassResult(
        which,
        tuple(run.seconds for run in runs),
        simulated.seconds,
        real.seconds,
        sum(sent.values()),
        sum(bytes_by_pair(target).values()),
        attention_steps(middle, schedules),
        attention_steps(simulated, schedules),
        attention_steps(real, target),
        middle,
        replace(simulated, meta={**simulated.meta, **middle.meta}),
        real,
    )
