"""How much a layer may offload without being late, when the configuration leaves that open. No torch here, until this
machine's own figures are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from counterpoint.cluster.cluster import Cluster
from counterpoint.cluster.presets import find_cluster
from counterpoint.model.config import ModelConfig
from counterpoint.planner.memory import Question, offload_ratio
from counterpoint.strategies.memory.policy import LayerPolicy
from counterpoint.training.config import TrainConfig


def settle_offload(
    config: TrainConfig, shape: ModelConfig, described: Callable[[], Cluster]
) -> tuple[TrainConfig, str]:
    """The configuration with a ratio wherever memory.layers says offload without one, and a line about it, if any.

    The ratio is ByteScale's, min(1, T B / A): what T seconds of a layer's forward pass copy of its A kept bytes at
    B bytes/s, for a sequence as long as the run's. Processes that share it have their part of all three. described:
    gives the devices, when they are asked for. Raises ValueError when these have no host memory.
    """
    layers = config.memory.policy.layers
    if all(layer.ratio is not None for layer in layers):
        return config, ""
    cluster = described()
    if not any(tier.name == "host" for tier in cluster.device(0).memory):
        raise ValueError(
            f"memory.layers = offload: devices of cluster {cluster.name} name no host memory; name one with "
            "memory.cluster, or give a ratio, as in offload(0.5)"
        )
    quoted = any("bfloat16" in table for table in cluster.device(0).rates.values())
    dtype = "bfloat16" if quoted and config.training.precision != "float32" else "float32"
    question = Question(shape, cluster, config.data.sequence_length, dtype=dtype)
    ratio = int(1000 * offload_ratio(question)) / 1000
    found = LayerPolicy("offload", ratio=ratio)
    texts = tuple(str(found if layer.ratio is None else layer) for layer in layers)
    memory = config.memory.model_copy(update={"layers": texts})
    line = (
        f"offload: {ratio:.1%} of what a layer keeps of {config.data.sequence_length:,} tokens ({dtype}) goes to the "
        f"host while the next one computes, by the figures of {cluster.name}"
    )
    return config.model_copy(update={"memory": memory}), line


def figures(config: TrainConfig, environ: Mapping[str, str]) -> Cluster:
    """The cluster that memory.cluster names, or this machine as `counterpoint calibrate` has measured it.

    environ: the environment, which says where measurements are kept. Raises ValueError when there are none.
    """
    if config.memory.cluster is not None:
        return find_cluster(config.memory.cluster)
    from counterpoint.calibration.cache import cache_file, load_cached
    from counterpoint.calibration.describe import describe
    from counterpoint.calibration.machine import this_machine

    machine = this_machine()
    for quick in (False, True):
        count = len(machine.accelerators)
        found = load_cached(cache_file(machine, count, True, quick, environ)) if count else None
        if found is not None:
            return describe(found)[0]
    raise ValueError(
        "memory.layers = offload asks how much of the copies computing hides, and this machine has not been measured; "
        "run counterpoint calibrate, name a description with memory.cluster, or give a ratio, as in offload(0.5)"
    )
