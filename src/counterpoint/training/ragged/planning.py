"""Who plans the ragged batches of a run, and for which cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from counterpoint.cluster.cluster import Cluster
from counterpoint.cluster.load import parse_cluster
from counterpoint.cluster.presets import find_cluster
from counterpoint.model.config import ModelConfig
from counterpoint.planner.ahead import PlanAhead, Solver
from counterpoint.planner.batch_cost import BatchCost
from counterpoint.planner.batch_solvers.bytescale import bytescale
from counterpoint.planner.batch_solvers.dynamic_cp import dynamic_cp
from counterpoint.planner.batch_solvers.flexsp import flexsp
from counterpoint.planner.batch_solvers.static import static
from counterpoint.training.config import TrainConfig
from counterpoint.training.ragged.lengths import tokens_per_rank

# Rough figures of processes on the cores of one machine, good enough to tell long sequences from short ones.
MACHINE = """
name: this machine, roughly
devices:
  core:
    memory: {{ram: {{size: 8 GB, bandwidth: 10 GB/s}}}}
    rates:
      matmul: {{float32: 60 GFLOP/s, bfloat16: 60 GFLOP/s}}
      attention_forward: {{float32: 50 GFLOP/s, bfloat16: 50 GFLOP/s}}
      attention_backward: {{float32: 50 GFLOP/s, bfloat16: 50 GFLOP/s}}
    peak: {{float32: 70 GFLOP/s, bfloat16: 70 GFLOP/s}}
    launch: 20 us
levels:
  - {{level: node, count: {count}, link: switch, bandwidth: 1.5 GB/s, latency: 200 us}}
"""


@contextmanager
def planning(config: TrainConfig, shape: ModelConfig, world_size: int) -> Iterator[PlanAhead]:
    """Processes that plan the batches of a run."""
    batching = config.batching
    cost = batch_cost(config, shape, world_size)
    # the batches ahead, the next one, and one of held-out text
    with PlanAhead(solver_of(config), cost, workers=batching.workers, ahead=batching.ahead + 2) as planner:
        yield planner


def solver_of(config: TrainConfig) -> Solver:
    """The function that plans a batch; the static one keeps groups of `parallel.sequence`."""
    if config.batching.solver == "static":
        return partial(static, degree=config.parallel.sequence_size)
    return {"flexsp": flexsp, "bytescale": bytescale, "dynamic_cp": dynamic_cp}[config.batching.solver]


def batch_cost(config: TrainConfig, shape: ModelConfig, world_size: int) -> BatchCost:
    """What batches of the run cost. Parameters stay whole during a step, so nothing is waited for between groups."""
    (strategy, *_) = config.parallel.forward
    return BatchCost(
        shape,
        planned_cluster(config, world_size),
        world_size,
        "ulysses" if strategy.startswith("ulysses") else "ring",
        state="zero1",
        dtype="bfloat16" if config.training.precision == "bfloat16" else "float32",
        tokens_per_rank=tokens_per_rank(config),
        linear=config.parallel.linear,
    )


def planned_cluster(config: TrainConfig, world_size: int) -> Cluster:
    """The cluster that plans are made for. Raises ValueError when it has too few devices."""
    name = config.batching.cluster
    if name is None:
        return parse_cluster(MACHINE.format(count=world_size), "this machine")
    cluster = find_cluster(name)
    if cluster.world_size < world_size:
        raise ValueError(
            f"batching.cluster = {name} has {cluster.world_size} devices, and {world_size} processes run; "
            "name a larger one"
        )
    return cluster.subset(world_size)
