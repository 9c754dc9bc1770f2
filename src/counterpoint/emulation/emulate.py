"""Runs attention on a scale model of a cluster, and sets what is measured beside what is simulated."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from counterpoint.cluster.cluster import Cluster
from counterpoint.emulation import network
from counterpoint.emulation.namespaces import Namespaces
from counterpoint.emulation.result import Emulation, How, PassResult, attention_steps, computed_seconds
from counterpoint.emulation.scale import (
    LEAST_SECONDS,
    PASS_SECONDS,
    Problem,
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
from counterpoint.emulation.worker import Job, Pass, Run
from counterpoint.files import scratch
from counterpoint.schedule.schedule import Schedule
from counterpoint.schedule.timeline import Timeline
from counterpoint.simulator.simulate import simulate
from counterpoint.strategies.sequence.linear import LinearProblem


@contextmanager
def stoppable() -> Iterator[None]:
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


def emulate(
    cluster: Cluster,
    problem: Problem,
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
    (found,) = emulate_all(
        cluster, [problem], passes=passes, compute=compute, slowdown=slowdown, repetitions=repetitions,
        environ=environ, say=say,
    )  # fmt: skip
    return found


@stoppable()
def emulate_all(
    cluster: Cluster,
    problems: Sequence[Problem],
    *,
    passes: Sequence[Pass] = ("forward",),
    compute: How = "timed",
    slowdown: float | None = None,
    repetitions: int = 3,
    pass_seconds: float = PASS_SECONDS,
    environ: Mapping[str, str],
    say: Callable[[str], None] = lambda _: None,
) -> list[Emulation]:
    """Run problems of as many ranks one after the other on one scale model, with the same processes and links.

    pass_seconds: about as long a problem's longest pass should take, if compute is timed. Other arguments and errors
    as of `emulate`; kernels that compute, and a given slowdown, suit one problem only.
    """
    world_size = problems[0].layout.world_size
    assert all(p.layout.world_size == world_size for p in problems)
    assert len(problems) == 1 or (compute == "timed" and slowdown is None)
    cluster = cluster.subset(world_size)
    if not 2 <= world_size <= network.MOST_RANKS:
        raise ValueError(f"a scale model has 2 to {network.MOST_RANKS} ranks; {world_size} were asked for")
    Namespaces(1).close()  # before anything takes time
    targets = [_target(cluster, problem, passes) for problem in problems]
    if compute == "timed":
        parts = _timed(cluster, targets, slowdown, pass_seconds)
    else:
        from counterpoint.emulation.real import real_scale

        if isinstance(problems[0], LinearProblem):
            raise ValueError("a scale model of linear attention holds its kernels; use --compute timed")
        say("measuring how fast this machine computes")
        small, scale = real_scale(
            cluster, problems[0], passes, targets[0].schedules, targets[0].longest, slowdown
        )
        parts = [(small, scale)]
    everything = [s for target in targets for s in target.everything]
    rates = {pair: rate / parts[0][1].rates for pair, rate in pair_rates(cluster, everything).items()}
    topology = build_topology(scaled_cluster(cluster, parts[0][1], 0.0), rates)
    say(f"building {world_size} namespaces and {len(topology.wires)} links")
    with scratch() as directory:
        with Namespaces(world_size + 1) as namespaces:
            network.set_up(namespaces, topology)
            runs = [
                Run(
                    number, small, tuple(passes), target.held(scale) if compute == "timed" else {},
                    repetitions, directory,
                )
                for number, (target, (small, scale)) in enumerate(zip(targets, parts, strict=True))
            ]  # fmt: skip
            job = Job(
                tuple(runs),
                tuple(namespaces.path(rank) for rank in range(world_size)),
                directory,
                timeout=60.0
                + 10 * max(t.longest * scale.slowdown for t, (_, scale) in zip(targets, parts, strict=True)),
            )
            say(f"running {world_size} ranks")
            launch_ranks(job, environ)
        latency = median_latency(job)
        return [
            _emulation(cluster, target, run, scale, latency, len(topology.wires))
            for target, run, (_, scale) in zip(targets, runs, parts, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Target:
    """A problem on the cluster: schedules of all ranks, and what the simulator says of them."""

    cluster: Cluster
    problem: Problem
    schedules: Mapping[Pass, list[Schedule]]
    timelines: Mapping[Pass, Timeline]

    @property
    def everything(self) -> list[Schedule]:
        return [s for schedules in self.schedules.values() for s in schedules]

    @property
    def longest(self) -> float:
        """Seconds of the longest pass."""
        return max(t.seconds for t in self.timelines.values())

    def held(self, scale: Scale) -> dict[Pass, list[list[float]]]:
        """How long every rank holds every step on the scale model (s)."""
        return {
            which: [[t * scale.slowdown for t in step_seconds(self.cluster, s)] for s in schedules]
            for which, schedules in self.schedules.items()
        }


def _target(cluster: Cluster, problem: Problem, passes: Sequence[Pass]) -> _Target:
    schedules: dict[Pass, list[Schedule]] = {which: _schedules(problem, which) for which in passes}
    return _Target(cluster, problem, schedules, {w: simulate(s, cluster) for w, s in schedules.items()})


def _timed(
    cluster: Cluster, targets: Sequence[_Target], slowdown: float | None, pass_seconds: float
) -> list[tuple[Problem, Scale]]:
    """Shorter sequences, and slowdowns that together with them bring all rates to what this machine carries."""
    rates = max(choose_rates(cluster, target.everything, target.longest) for target in targets)
    parts: list[tuple[Problem, Scale]] = []
    for target in targets:
        wanted = slowdown or min(rates, pass_seconds / target.longest)
        small = shrunk(target.problem, max(1.0, rates / wanted))
        if any(not same_steps(s, _schedules(small, which)) for which, s in target.schedules.items()):
            small = target.problem
        sent = sum(sum(bytes_by_pair(schedules).values()) for schedules in target.schedules.values())
        sent_small = sum(sum(bytes_by_pair(_schedules(small, which)).values()) for which in target.schedules)
        shrink = sent / sent_small if sent_small else 1.0
        least = LEAST_SECONDS / target.longest if len(targets) == 1 else 0.0  # several have one rate together
        scale = Scale(slowdown or max(rates / shrink, least), shrink)
        if target.longest * scale.slowdown < LEAST_SECONDS or scale.rates < rates / 4:
            least = max(LEAST_SECONDS / target.longest, rates / shrink)
            raise ValueError(
                f"with a factor of {scale.slowdown:.3g} a pass takes {1e3 * target.longest * scale.slowdown:.3g} ms, "
                f"too fast for this machine to imitate; use a factor of {least:.3g} or more"
            )
        parts.append((small, scale))
    return parts


def _schedules(problem: Problem, which: Pass) -> list[Schedule]:
    return [problem.schedule(which, rank) for rank in range(problem.layout.world_size)]


def launch_ranks(job: Job, environ: Mapping[str, str]) -> None:
    """Do a job on its ranks, in their namespaces. Raises WorkerFailure when one fails."""
    from counterpoint.training.launch import launch

    # the only address of a rank's loopback device is the one under which its peers know it
    environ = {**environ, "GLOO_SOCKET_IFNAME": "lo"}
    arguments = ["-m", "counterpoint", "emulate-worker", str(job.write())]
    code = launch(arguments, job.world_size, environ)
    if code:
        raise SystemExit(code)


def median_latency(job: Job) -> float:
    """Median one-way latency (s) over all pairs of ranks."""
    found: list[float] = []
    for rank in range(job.world_size):
        found += json.loads(job.latency_file(rank).read_text()).values()
    return median(found)


def _emulation(
    cluster: Cluster, target: _Target, run: Run, scale: Scale, latency: float, wires: int
) -> Emulation:
    ranks, seconds, difference = range(target.problem.layout.world_size), run.seconds, None
    if not run.held:
        from counterpoint.emulation.real import worst_difference

        seconds = {
            which: [json.loads(run.seconds_file(which, rank).read_text()) for rank in ranks] for which in run.passes
        }  # fmt: skip
        difference = worst_difference(run)
    model = scaled_cluster(cluster, scale, latency)
    results = tuple(_result(run, which, seconds[which], target, model, scale) for which in run.passes)
    return Emulation(
        cluster, target.problem, run.problem, "timed" if run.held else "real", scale, latency, results, wires,
        difference,
    )  # fmt: skip


def _result(
    run: Run, which: Pass, seconds: list[list[float]], target: _Target, model: Cluster, scale: Scale
) -> PassResult:
    from counterpoint.emulation.held import hold

    schedules, real = _schedules(run.problem, which), target.timelines[which]
    simulated = simulate([hold(s, t) for s, t in zip(schedules, seconds, strict=True)], model)
    ranks = range(run.problem.layout.world_size)
    measured = [
        Timeline.merge(Timeline.read(run.timeline_file(which, repetition, rank)) for rank in ranks).shifted()
        for repetition in range(1, run.repetitions + 1)
    ]
    measured.sort(key=lambda timeline: timeline.seconds)
    middle = measured[len(measured) // 2]
    middle.meta = {
        "schedule": schedules[0].name,
        "slowdown": scale.slowdown,
        "bytes divided by": scale.shrink,
        "tokens": run.problem.layout.tokens,
    }
    sent = middle.bytes_by_link()
    assert sent == simulated.bytes_by_link(), "measured and simulated bytes differ"
    return PassResult(
        which,
        tuple(timeline.seconds for timeline in measured),
        tuple(
            (computed_seconds(timeline) - computed_seconds(simulated)) / len(ranks) / simulated.seconds
            for timeline in measured
        ),
        simulated.seconds,
        real.seconds,
        sum(sent.values()),
        sum(bytes_by_pair(target.schedules[which]).values()),
        attention_steps(middle, schedules),
        attention_steps(simulated, schedules),
        attention_steps(real, target.schedules[which]),
        middle,
        Timeline("simulated", simulated.spans, simulated.memory, {**simulated.meta, **middle.meta}),
        real,
    )
