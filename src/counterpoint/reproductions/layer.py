"""A transformer layer under Ulysses and under Megatron-SP, as far as it can be predicted today.

Simulated: attention with Ulysses' exchanges, and Megatron-SP's all-gathers. From the device's table of rates: the
four matrix products, forward once and backward twice. Left out on both sides: norms and other elementwise work,
embeddings, loss, the optimizer, ZeRO's gathers of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from counterpoint.cluster.cluster import Cluster
from counterpoint.kernels.kernel import TensorSpec
from counterpoint.reproductions.bench import Bench, Case, Pass
from counterpoint.strategies.data.gather import all_gather

BFLOAT16 = 2


@dataclass(frozen=True, slots=True)
class Model:
    """A dense GPT; head_dim = hidden / heads."""

    hidden: int
    heads: int


def gather_seconds(mesh: tuple[int, int], spec: TensorSpec, cluster: Cluster) -> float:
    """Time (s) of an all-gather of one such tensor per rank, or of the reduce-scatter that mirrors it."""
    from counterpoint.simulator.fold import fold
    from counterpoint.simulator.simulate import simulate

    schedules, symmetry = fold(lambda rank: all_gather(mesh, rank, spec), mesh)
    return simulate(schedules, cluster, symmetry=symmetry).seconds


def matmul_seconds(model: Model, tokens: int, split: int, cluster: Cluster) -> float:
    """Time (s) of the products of a layer, forward and backward, with weights split over `split` ranks."""
    h, device, total = model.hidden, cluster.device(0), 0.0
    for inner, outer in ((h, 3 * h // split), (h // split, h), (h, 4 * h // split), (4 * h // split, h)):
        flops = 2 * tokens * inner * outer
        nbytes = BFLOAT16 * (tokens * inner + inner * outer + tokens * outer)
        total += 3 * device.seconds("matmul", flops, nbytes, "bfloat16")
    return total


def ulysses_case(model: Model, mesh: tuple[int, int], tokens: int) -> Case:
    head_dim = model.hidden // model.heads
    return Case("ulysses", (prod(mesh),), tokens, model.heads, model.heads, head_dim, layout="contiguous")


PASSES: tuple[Pass, ...] = ("forward", "backward")


def ulysses_seconds(
    bench: Bench, model: Model, mesh: tuple[int, int], tokens: int, cluster: Cluster
) -> float:
    """One layer, forward and backward (s): attention with its exchanges, products of N/P tokens with whole weights."""
    case = ulysses_case(model, mesh, tokens)
    attention = sum(bench.simulate(case, way, cluster).seconds for way in PASSES)
    return attention + matmul_seconds(model, tokens // prod(mesh), 1, cluster)


def megatron_seconds(
    bench: Bench, model: Model, mesh: tuple[int, int], tokens: int, cluster: Cluster
) -> float:
    """The same under Megatron-SP: four all-gathers and four reduce-scatters, H/P heads, weights split by P."""
    ranks, head_dim = prod(mesh), model.hidden // model.heads
    heads = model.heads // ranks
    alone = Case("ulysses", (1,), tokens, heads, heads, head_dim, layout="contiguous")
    attention = sum(bench.simulate(alone, way, cluster).seconds for way in PASSES)
    spec = TensorSpec((1, tokens // ranks, model.hidden), "bfloat16")
    exchanges = 8 * gather_seconds(mesh, spec, cluster)
    return attention + exchanges + matmul_seconds(model, tokens, ranks, cluster)


def layer_flops(model: Model, tokens: int) -> float:
    """Floating-point operations of one layer, forward and backward, the masked half of attention not counted."""
    return 72 * tokens * model.hidden**2 + 6 * tokens**2 * model.hidden
