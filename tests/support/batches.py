"""A small model, clusters and lengths for tests of batch planning."""

from __future__ import annotations

from functools import lru_cache

from counterpoint.cluster.presets import find_cluster
from counterpoint.model.config import ModelConfig
from counterpoint.planner.batch_cost import BatchCost

MODEL = ModelConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=4, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128,
)  # fmt: skip


@lru_cache(maxsize=16)
def small_cost(
    ranks: int = 8, state: str = "zero3", strategy: str = "ulysses", tokens_per_rank: int = 4096
) -> BatchCost:
    cluster = find_cluster("dgx-a100-pod" if ranks > 8 else "dgx-a100")
    return BatchCost(MODEL, cluster, ranks, strategy, state, tokens_per_rank=tokens_per_rank)  # type: ignore[arg-type]
