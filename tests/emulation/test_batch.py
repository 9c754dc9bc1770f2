"""Plans of a batch on a scale model: the real schedules of their groups over rate-limited links."""

import os

import pytest

from counterpoint.cluster.load import parse_cluster
from counterpoint.emulation.batch import emulate_batch
from counterpoint.model.config import ModelConfig
from counterpoint.planner.batch import BatchPlan, Group, MicroBatch
from emulation.test_emulate import needs_namespaces

pytestmark = pytest.mark.processes
CLUSTER = """
name: two nodes of two
devices:
  gpu:
    memory: {hbm: {size: 40 GB, bandwidth: 1 TB/s}}
    rates:
      matmul: {bfloat16: 100 TFLOP/s}
      attention_forward: {bfloat16: 100 TFLOP/s}
      attention_backward: {bfloat16: 80 TFLOP/s}
    launch: 5 us
levels:
  - {level: node, count: 2, link: switch, bandwidth: 20 GB/s, latency: 10 us}
  - {level: cluster, count: 2, link: switch, ports: 2, bandwidth: 2 GB/s, latency: 10 us}
"""
MODEL = ModelConfig(
    vocab_size=1000, hidden_size=2048, intermediate_size=5504, num_hidden_layers=2, num_attention_heads=16,
    num_key_value_heads=16, head_dim=128,
)  # fmt: skip


@needs_namespaces
def test_groups_inside_nodes_beat_one_group_across_them():
    lengths = (4096, 4096, 4096, 4096)
    across = BatchPlan(lengths, 4, (MicroBatch((Group((0, 1, 2, 3), (0, 1, 2, 3)),)),), "across")
    inside = BatchPlan(lengths, 4, (MicroBatch((Group((0, 1), (0, 1)), Group((2, 3), (2, 3)))),), "inside")
    result = emulate_batch(
        parse_cluster(CLUSTER, "two nodes"),
        {"across": across, "inside": inside},
        MODEL,
        strategy="ulysses",
        repetitions=1,
        environ=os.environ,
    )
    assert result.order == ("across", "inside")
    for measured in result.plans.values():
        assert measured.error == pytest.approx(0, abs=0.3)
        assert measured.timeline.ranks == [0, 1, 2, 3]
    simulated = result.plans["across"].cluster / result.plans["inside"].cluster
    assert simulated > 1.5 and result.ratio("across", "inside") == pytest.approx(simulated, rel=0.35)


def test_plans_for_different_numbers_of_ranks_are_refused():
    plans = {str(n): BatchPlan((8,), n, (MicroBatch((Group((0,), (0,)),)),), "by hand") for n in (2, 4)}
    with pytest.raises(ValueError, match=r"the plans are for \[2, 4\] ranks; give plans for one number"):
        emulate_batch(parse_cluster(CLUSTER, "two nodes"), plans, MODEL, strategy="ring", environ={})
