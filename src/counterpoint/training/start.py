"""The weights that a run starts from, and the frozen model that some objectives compare with."""

from __future__ import annotations

from pathlib import Path

from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Decoder
from counterpoint.training.config import TrainConfig
from counterpoint.training.mesh import Processes
from counterpoint.training.step import shard
from counterpoint.training.trained import load_trained


def first_model(config: TrainConfig, shape: ModelConfig) -> Decoder:
    """The model before its first step: of training.start, or random from the seed. ValueError when it does not fit."""
    if config.training.start is None:
        return Decoder(shape, config.training.seed)
    return _read("training.start", config.training.start, config, shape)


def frozen_reference(config: TrainConfig, shape: ModelConfig, processes: Processes) -> Decoder | None:
    """The reference model of dpo and grpo, sharded like the trained one; None where the loss needs none.

    That of loss.reference, else the model before its first step, so a resumed run finds the same one.
    """
    if config.loss.objective not in ("dpo", "grpo"):
        return None
    path = config.loss.reference
    model = first_model(config, shape) if path is None else _read("loss.reference", path, config, shape)
    return shard(model, config, processes, frozen=True)


def _read(key: str, path: str, config: TrainConfig, shape: ModelConfig) -> Decoder:
    if Path(path).resolve() == Path(config.directory).resolve():
        raise ValueError(f"{key} = {path} is this run's own directory, whose weights change; name another")
    try:
        model, _ = load_trained(path)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    expected = {name: p.shape for name, p in Decoder(shape).named_parameters()}
    found = {name: p.shape for name, p in model.named_parameters()}
    if found != expected:
        raise ValueError(
            f"{key} = {path}: holds a model of another shape than this run's; set model and data.tokenizer to its own"
        )
    decoder = Decoder(shape)
    decoder.load_state_dict(model.state_dict())
    return decoder
