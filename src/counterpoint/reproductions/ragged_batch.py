"""A long-tail batch on two nodes with a slow network between them: FlexSP's plan against the best static one.

Small enough for a scale model of 8 ranks: every group's schedules run for real, kernels held for their time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from counterpoint.cluster.load import parse_cluster
from counterpoint.emulation.batch import BatchEmulation, emulate_batch
from counterpoint.model.config import ModelConfig
from counterpoint.planner.batch import BatchPlan
from counterpoint.planner.batch_cost import BatchCost
from counterpoint.planner.batch_solvers.flexsp import flexsp
from counterpoint.planner.batch_solvers.static import adaptive

RANKS = 8
# An A100 as in the preset dgx-a100; nodes of four of them and a network port each.
CLUSTER = """
name: two nodes
devices:
  a100:
    memory: {{hbm: {{size: 40 GB, bandwidth: 1555 GB/s, attained: 1330 GB/s}}}}
    peak: {{bfloat16: 312 TFLOP/s}}
    rates:
      matmul: {{bfloat16: {{1 GFLOP: 40 TFLOP/s, 10 GFLOP: 140 TFLOP/s, 100 GFLOP: 225 TFLOP/s}}}}
      attention_forward: {{bfloat16: {{1 GFLOP: 35 TFLOP/s, 10 GFLOP: 110 TFLOP/s, 100 GFLOP: 190 TFLOP/s}}}}
      attention_backward: {{bfloat16: {{1 GFLOP: 25 TFLOP/s, 10 GFLOP: 85 TFLOP/s, 100 GFLOP: 155 TFLOP/s}}}}
    launch: 4 us
levels:
  - {{level: node, count: 4, link: switch, bandwidth: 100 GB/s, latency: 8 us}}
  - {{level: cluster, count: 2, link: switch, ports: 4, bandwidth: {network:g} GB/s, latency: 15 us}}
"""


@dataclass(frozen=True, slots=True)
class Setting:
    """A batch of `sequences` lengths, `longest` the last; network: bytes a second of a device's port, in GB/s."""

    sequences: int = 96
    longest: int = 65_536
    tokens_per_rank: int = 12_288
    network: float = 3.125
    seed: int = 0

    @property
    def lengths(self) -> list[int]:
        """A lognormal body (median 1,500 tokens) with a Pareto tail, and one sequence that needs all devices."""
        rng = random.Random(self.seed)
        found = []
        for _ in range(self.sequences - 1):
            body = rng.lognormvariate(7.3, 0.9) if rng.random() < 0.95 else 4096 * rng.paretovariate(1.2)
            found.append(max(32, min(int(body), self.longest // 2)))
        return [*found, self.longest]

    @property
    def model(self) -> ModelConfig:
        """A GPT-7B."""
        return ModelConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=32, head_dim=128,
        )  # fmt: skip

    def cost(self) -> BatchCost:
        cluster = parse_cluster(CLUSTER.format(network=self.network), "two nodes")
        return BatchCost(self.model, cluster, RANKS, "ulysses", "zero1", tokens_per_rank=self.tokens_per_rank)


def plans(setting: Setting, cost: BatchCost) -> dict[str, BatchPlan]:
    """The plan of the best single degree for this batch, and FlexSP's."""
    return {"static": adaptive(setting.lengths, cost), "flexsp": flexsp(setting.lengths, cost)}


def emulate_plans(
    setting: Setting,
    environ: Mapping[str, str],
    *,
    repetitions: int = 2,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, BatchPlan], BatchEmulation]:
    """Both plans in turn on a scale model. Needs root on Linux (Unsupported, a ValueError, says what is missing)."""
    cost = setting.cost()
    made = plans(setting, cost)
    result = emulate_batch(
        cost.cluster,
        made,
        setting.model,
        strategy="ulysses",
        repetitions=repetitions,
        environ=environ,
        say=say,
    )
    return made, result
