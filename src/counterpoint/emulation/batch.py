"""Plans of one ragged batch on a scale model of a cluster, measured in turn and set beside the simulation.

The programs are the schedules of `planner.batch_schedule`: a layer, forward and backward, of every group. Kernels are
held for the time they take on the cluster. Messages are made small by heads of fewer elements, so their steps, peers
and order are those of the whole batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from counterpoint.cluster.cluster import Cluster
from counterpoint.emulation import network
from counterpoint.emulation.emulate import launch_ranks, median_latency, stoppable
from counterpoint.emulation.held import hold
from counterpoint.emulation.namespaces import Namespaces
from counterpoint.emulation.programs import Programs
from counterpoint.emulation.scale import (
    Scale,
    bytes_by_pair,
    choose_rates,
    pair_rates,
    scaled_cluster,
    step_seconds,
)
from counterpoint.emulation.topology import build_topology
from counterpoint.emulation.worker import Job
from counterpoint.files import scratch
from counterpoint.model.config import ModelConfig
from counterpoint.planner.batch import BatchPlan
from counterpoint.planner.batch_schedule import batch_schedule
from counterpoint.schedule.schedule import Schedule
from counterpoint.schedule.timeline import Timeline
from counterpoint.simulator.simulate import simulate
from counterpoint.strategies.sequence.attention import Choices

LEAST_SECONDS = 1.0  # of a program on the scale model: kernels last milliseconds then


@dataclass(frozen=True, slots=True)
class Measured:
    """One plan: measured (all runs) and simulated on the scale model, and simulated on the cluster; seconds a layer.

    timeline: of the run in the middle.
    """

    measured: tuple[float, ...]
    simulated: float
    cluster: float
    timeline: Timeline

    @property
    def seconds(self) -> float:
        return median(self.measured)

    @property
    def error(self) -> float:
        """Measured over simulated, less one."""
        return self.seconds / self.simulated - 1


@dataclass(frozen=True, slots=True)
class BatchEmulation:
    """Plans by name, and the scale they were measured at."""

    scale: Scale
    latency_seconds: float
    order: tuple[str, ...]
    plans: dict[str, Measured]

    def ratio(self, slow: str, fast: str) -> float:
        """How many times as fast one plan is as another, as measured."""
        return self.plans[slow].seconds / self.plans[fast].seconds

    def to_json(self) -> dict[str, Any]:
        return {
            "scale": asdict(self.scale),
            "latency_seconds": self.latency_seconds,
            "order": list(self.order),
            "plans": {
                name: {
                    "measured_all_seconds": list(m.measured),
                    "measured_seconds": m.seconds,
                    "simulated_seconds": m.simulated,
                    "error": m.error,
                    "cluster_simulated_seconds": m.cluster,
                    "cluster_measured_seconds": m.seconds / self.scale.slowdown,
                }
                for name, m in self.plans.items()
            },
        }


@stoppable()
def emulate_batch(
    cluster: Cluster,
    plans: Mapping[str, BatchPlan],
    model: ModelConfig,
    *,
    strategy: Choices,
    dtype: str = "bfloat16",
    head_dim: int | None = None,
    repetitions: int = 2,
    environ: Mapping[str, str],
    say: Callable[[str], None] = lambda _: None,
) -> BatchEmulation:
    """Run plans in turn (A B A B for two repetitions of two plans) on a scale model of the cluster's first ranks.

    head_dim: elements of a head in the messages of the scale model; default: as few as make a plan take a second, and
    no fewer, since very small messages pass a rate limit unhindered. environ: for the workers.

    Raises:
        ValueError: plans for different numbers of ranks, more than the cluster has or a scale model takes;
            Unsupported (a ValueError): no rights or no kernel support for namespaces.
        WorkerFailure: a rank failed.
    """
    (world_size, *others) = {plan.world_size for plan in plans.values()}
    if others or not 2 <= world_size <= min(network.MOST_RANKS, cluster.world_size):
        raise ValueError(
            f"the plans are for {sorted([world_size, *others])} ranks; give plans for one number of them, from 2 to "
            f"{min(network.MOST_RANKS, cluster.world_size)}"
        )
    cluster = cluster.subset(world_size)
    Namespaces(1).close()  # before anything takes time

    def schedules(plan: BatchPlan, elements: int | None) -> list[Schedule]:
        return [
            batch_schedule(plan, model, rank, strategy=strategy, dtype=dtype, head_dim=elements)
            for rank in range(world_size)
        ]

    say("simulating the plans on the cluster")
    target = {name: schedules(plan, None) for name, plan in plans.items()}
    real = {name: simulate(of_ranks, cluster).seconds for name, of_ranks in target.items()}
    slower = max(choose_rates(cluster, of_ranks, real[name]) for name, of_ranks in target.items())
    if head_dim is None:
        head_dim = max(
            1, min(model.head_dim, round(model.head_dim * LEAST_SECONDS / min(real.values()) / slower))
        )
    small = {name: schedules(plan, head_dim) for name, plan in plans.items()}
    scale = _scale(slower, target, small, real)
    held = {
        name: [
            hold(s, [t * scale.slowdown for t in step_seconds(cluster, whole)])
            for s, whole in zip(small[name], target[name], strict=True)
        ]
        for name in plans
    }
    everything = [s for of_ranks in target.values() for s in of_ranks]
    rates = {pair: rate / scale.rates for pair, rate in pair_rates(cluster, everything).items()}
    topology = build_topology(scaled_cluster(cluster, scale, 0.0), rates)
    order = tuple(plans) * repetitions
    longest = max(real.values()) * scale.slowdown
    say(f"running {world_size} ranks, {len(order)} batches of up to {longest:.1f} s")
    with scratch() as directory:
        with Namespaces(world_size + 1) as namespaces:
            network.set_up(namespaces, topology)
            programs = Programs(held, order, directory)
            places = tuple(namespaces.path(rank) for rank in range(world_size))
            job = Job((programs,), places, directory, timeout=60.0 + 10 * longest)
            launch_ranks(job, environ)
        latency = median_latency(job)
        made = scaled_cluster(cluster, scale, latency)
        found = {
            name: _measured(programs, world_size, name, simulate(held[name], made), real[name])
            for name in plans
        }
    return BatchEmulation(scale, latency, order, found)


def _scale(
    slower: float,
    target: Mapping[str, Sequence[Schedule]],
    small: Mapping[str, Sequence[Schedule]],
    real: Mapping[str, float],
) -> Scale:
    """Time and bytes of the scale model, whose links are at least `slower` times slower, as this machine needs."""
    totals = [
        sum(sum(bytes_by_pair(of_ranks).values()) for of_ranks in side.values()) for side in (target, small)
    ]
    shrink = totals[0] / totals[1] if totals[1] else 1.0
    return Scale(max(slower / shrink, LEAST_SECONDS / min(real.values())), shrink)


def _measured(job: Programs, world_size: int, name: str, simulated: Timeline, cluster: float) -> Measured:
    ranks = range(world_size)
    numbers = [number for number, program in enumerate(job.order) if program == name]
    seconds = [json.loads(job.seconds_file(rank).read_text()) for rank in ranks]
    took = {number: max(of_rank[number] for of_rank in seconds) for number in numbers}
    middle = sorted(numbers, key=lambda n: took[n])[len(numbers) // 2]
    timeline = Timeline.merge(Timeline.read(job.timeline_file(middle, rank)) for rank in ranks).shifted()
    assert timeline.bytes_by_link() == simulated.bytes_by_link(), "measured and simulated bytes differ"
    return Measured(tuple(took[n] for n in numbers), simulated.seconds, cluster, timeline)
