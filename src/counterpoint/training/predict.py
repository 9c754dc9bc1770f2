"""From a training configuration to its step as a schedule, and to what this machine or a cluster makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from counterpoint.cluster.cluster import Cluster
from counterpoint.planner.step import StepPrediction, predict_step
from counterpoint.strategies.sequence.attention import parse_choices
from counterpoint.strategies.sequence.linear import parse_linear
from counterpoint.strategies.step import TrainStep
from counterpoint.training.config import TrainConfig
from counterpoint.training.model import check_attention, check_memory, model_config
from counterpoint.training.offload import settle_offload

BYTES = 257  # tokens of the bytes tokenizer


def step_of(config: TrainConfig, dtype: str = "float32", overlapped: bool = False) -> TrainStep:
    """The step that a configuration asks for; every sequence counts as one document.

    Raises ValueError for a configuration that could not run, or whose steps have no schedule yet.
    """
    if config.batching.ragged or config.loss.objective != "pretrain":
        raise ValueError(
            f"plan step knows packed pretraining only, not batching = {config.batching.solver} with loss.objective = "
            f"{config.loss.objective}; `counterpoint plan batch` and `plan memory` know more of these"
        )
    vocabulary = {"bytes": BYTES, "bpe": config.data.vocabulary}.get(config.data.tokenizer)
    shape = model_config(config.model, vocabulary)
    check_attention(config, shape)
    check_memory(config, shape)
    data = 1 if config.parallel.data == "auto" else config.parallel.data
    forward, backward = map(parse_choices, config.parallel.strategies)
    return TrainStep(
        shape, config.data.sequence_length, config.training.global_batch // data, data, config.parallel.sequence,
        config.parallel.layout, forward, backward, dtype, (), overlapped, parse_linear(config.parallel.linear),
        config.memory.policy,
    )  # fmt: skip


def predict_on(
    config: TrainConfig, cluster: Cluster, progress: Callable[[int, int], None] | None = None
) -> StepPrediction:
    """The step on a described cluster, in bfloat16 where its devices quote that and the configuration allows it."""
    config, _ = settle_offload(config, model_config(config.model), lambda: cluster)
    quoted = any("bfloat16" in table for table in cluster.device(0).rates.values())
    half = quoted and config.training.precision != "float32"
    step = step_of(config, "bfloat16" if half else "float32", overlapped=quoted)
    if step.world_size > cluster.world_size:
        raise ValueError(
            f"the configuration needs {step.world_size} ranks, but cluster {cluster.name} has {cluster.world_size}"
        )
    return predict_step(step, cluster, progress=progress)


def predict_here(config: TrainConfig, environ: Mapping[str, str], refresh: bool = False) -> StepPrediction:
    """The step on this machine's cores, from its parts as they are measured here (kept for the next time).

    environ: the environment, which says where measurements are kept. refresh: measure again.
    """
    from counterpoint.calibration.machine import this_machine
    from counterpoint.calibration.step import calibrate_step

    step = step_of(config)
    if step.model.linear is not None or any(p.kind == "offload" for p in step.memory.layers):
        raise ValueError(
            "linear attention layers and offloading are predicted from a description, not from parts measured here; "
            "name one with --cluster"
        )
    measured = calibrate_step(step, this_machine(), environ, refresh=refresh)
    return predict_step(step, measured.cluster(), costs=measured.costs())
