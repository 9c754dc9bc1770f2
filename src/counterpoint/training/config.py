"""The configuration of a training run: one YAML or Python file plus `--set key=value`, checked first.

Unknown keys are refused with the nearest known name, impossible values with what is allowed. Nothing here
imports torch.
"""

from __future__ import annotations

import runpy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from counterpoint.strategies.sequence.attention import parse_choices
from counterpoint.strategies.sequence.linear import parse_linear
from counterpoint.training.config_errors import explain, yaml_text
from counterpoint.training.config_sections import BatchingConfig, LossConfig, MemoryConfig, Section

Layout = Literal["contiguous", "zigzag", "striped", "document-zigzag"]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value


def _batching(value: Any) -> Any:
    """`batching: flexsp` for `batching: {solver: flexsp}`."""
    return {"solver": value or "none"} if value is None or isinstance(value, str) else value


def _strategies(value: Any) -> Any:
    """Names with options, one per sequence axis: "ring/tokenring(packets=4)" or a list of them."""
    if value is None or not isinstance(value, str | list | tuple):
        return value
    return tuple(str(choice) for choice in parse_choices(value))


def _linear_strategy(value: Any) -> Any:
    return str(parse_linear(value)) if isinstance(value, str) else value


class DataConfig(Section):
    paths: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field(
        (), description="text, jsonl, parquet files, directories or globs; empty: Python's standard library"
    )
    field: str = Field(
        "text", min_length=1, description="the field of a jsonl or parquet row that is the text"
    )
    tokenizer: str = Field(
        "bytes", min_length=1, description="bytes, bpe (trained here), or a tokenizer.json"
    )
    vocabulary: int = Field(4096, ge=260, description="vocabulary size of the bpe tokenizer")
    sequence_length: int = Field(1024, ge=2, description="tokens of a packed sequence")
    document_masking: bool = Field(True, description="attention stays inside a document")


class ParallelConfig(Section):
    data: int | Literal["auto"] = Field(
        "auto", description="replicas of the sequence group; auto: what is left"
    )
    sequence: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_as_list)] = Field(
        (1,),
        min_length=1,
        max_length=2,
        description="processes that share a sequence; [outer, inner] for two axes",
    )
    layout: Layout = Field(
        "zigzag", description="which tokens lie on which process; linear attention layers: always contiguous"
    )
    forward: Annotated[tuple[str, ...], BeforeValidator(_strategies)] = Field(
        ("tokenring",),
        description="attention strategy, one per sequence axis, with options: tokenring(packets=4)",
    )
    backward: Annotated[tuple[str, ...] | None, BeforeValidator(_strategies)] = Field(
        None, description="strategy of the backward pass; null: as forward"
    )
    linear: Annotated[str, BeforeValidator(_linear_strategy)] = Field(
        "states",
        description="strategy of linear attention layers: states (LASP-2) or states_chain (LASP-1)",
    )
    timeout: float = Field(120.0, gt=0, description="seconds after which a silent peer counts as lost")

    @property
    def sequence_size(self) -> int:
        size = 1
        for n in self.sequence:
            size *= n
        return size

    @property
    def strategies(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Forward and backward strategy of each sequence axis."""
        axes = len(self.sequence)
        forward, backward = self.forward, self.backward or self.forward
        return (forward * axes)[:axes], (backward * axes)[:axes]

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.data != "auto" and self.data < 1:
            raise ValueError(f"parallel.data = {self.data}: allowed is auto or at least 1")
        for name, strategies in (("forward", self.forward), ("backward", self.backward)):
            if strategies is not None and len(strategies) not in (1, len(self.sequence)):
                raise ValueError(
                    f"parallel.{name} names {len(strategies)} strategies for {len(self.sequence)} "
                    "sequence axes; give one, or one per entry of parallel.sequence"
                )
        return self


class OptimizerConfig(Section):
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    min_lr: float = Field(1e-4, ge=0, description="learning rate at the last step")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's moment decays")
    weight_decay: float = Field(0.1, ge=0, description="for matrices; vectors are not decayed")
    warmup: int | None = Field(
        None, ge=0, description="steps of linear warm-up; null: a twentieth of all steps, at most 100"
    )
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up")
    clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")

    def warmup_steps(self, steps: int) -> int:
        """Steps of warm-up in a run of so many steps."""
        return min(100, steps // 20) if self.warmup is None else self.warmup

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if self.schedule == "cosine" and self.min_lr > self.lr:
            raise ValueError(
                f"optimizer.min_lr = {self.min_lr:g} is above optimizer.lr = {self.lr:g}; lower it"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"optimizer.betas = {list(self.betas)}: allowed are two numbers from 0 to below 1"
            )
        return self


class TrainingConfig(Section):
    steps: int = Field(200, ge=1, description="optimizer steps of the whole run")
    global_batch: int = Field(4, ge=1, description="sequences per step, over all processes")
    seed: int = Field(0, ge=0, lt=2**63, description="of the weights and of the order of the data")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: float32 on CPU, bfloat16 mixed precision on CUDA"
    )
    start: str | None = Field(
        None,
        min_length=1,
        description="a run or Hugging Face directory whose weights to start from; null: random",
    )
    log_every: int = Field(1, ge=1, description="steps between two lines of progress")
    evaluate_every: int = Field(50, ge=0, description="steps between two validation losses; 0: none")
    evaluate_batches: int = Field(4, ge=1, description="global batches of held-out text per validation")


class CheckpointConfig(Section):
    every: int = Field(100, ge=0, description="steps between two checkpoints; 0: only at the end")
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept")
    resume: str = Field("auto", min_length=1, description="auto, never, or the directory of one checkpoint")


class MetricsConfig(Section):
    tensorboard: bool | Literal["auto"] = Field("auto", description="auto: when the package is installed")
    timeline_steps: tuple[int, ...] = Field(
        (), description="steps whose timeline is written to the run directory"
    )
    exposed: bool = Field(True, description="record the share of communication exposed at logged steps")


class TrainConfig(Section):
    """A whole run. Values are checked; keys that do not exist are refused."""

    directory: str = Field(
        "runs/train", min_length=1, description="checkpoints, metrics and the tokenizer go here"
    )
    model: str | dict[str, Any] = Field(
        "demo",
        description="preset name, Hugging Face config.json (or its directory), or the fields themselves",
    )
    data: DataConfig = DataConfig()  # type: ignore[call-arg]
    parallel: ParallelConfig = ParallelConfig()  # type: ignore[call-arg]
    batching: Annotated[BatchingConfig, BeforeValidator(_batching)] = BatchingConfig()  # type: ignore[call-arg]
    optimizer: OptimizerConfig = OptimizerConfig()  # type: ignore[call-arg]
    training: TrainingConfig = TrainingConfig()  # type: ignore[call-arg]
    memory: MemoryConfig = MemoryConfig()  # type: ignore[call-arg]
    loss: LossConfig = LossConfig()  # type: ignore[call-arg]
    checkpoint: CheckpointConfig = CheckpointConfig()  # type: ignore[call-arg]
    metrics: MetricsConfig = MetricsConfig()  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        warmup = self.optimizer.warmup
        if warmup is not None and warmup > self.training.steps:
            raise ValueError(
                f"optimizer.warmup = {warmup} exceeds training.steps = {self.training.steps}; "
                "shorten the warm-up"
            )
        if self.batching.ragged and self.loss.objective != "pretrain":
            raise ValueError(
                f"loss.objective = {self.loss.objective} packs its own examples, and batching = "
                f"{self.batching.solver} takes whole documents; use batching none"
            )
        if self.batching.ragged and len(self.parallel.sequence) > 1:
            raise ValueError(
                f"parallel.sequence = {list(self.parallel.sequence)} has two axes, and groups of batching = "
                f"{self.batching.solver} have one; give one number"
            )
        data = self.parallel.data
        if data != "auto" and not self.batching.ragged and self.training.global_batch % data:
            raise ValueError(
                f"training.global_batch = {self.training.global_batch} does not divide over "
                f"parallel.data = {data}; make it a multiple"
            )
        return self

    def with_world_size(self, world_size: int) -> TrainConfig:
        """This configuration with `parallel.data` filled in; ValueError when the sizes do not fit."""
        sequence, data = self.parallel.sequence_size, self.parallel.data
        if data == "auto":
            data = world_size // sequence
        if data * sequence != world_size:
            allowed = f"data x sequence = {self.parallel.data} x {sequence}"
            raise ValueError(
                f"{world_size} processes do not fit {allowed}; start "
                f"{max(data, 1) * sequence} processes or change parallel.data, parallel.sequence"
            )
        return TrainConfig.model_validate(_merge(self.model_dump(), {"parallel": {"data": data}}))

    @property
    def processes(self) -> ParallelConfig:
        """The mesh to lay over the processes: with ragged batches any of them may share a sequence."""
        if not self.batching.ragged or self.parallel.data == "auto":
            return self.parallel
        size = self.parallel.data * self.parallel.sequence_size
        return self.parallel.model_copy(update={"data": 1, "sequence": (size,)})

    def to_yaml(self, comments: bool = False) -> str:
        """The configuration as YAML that reads back equal, with what every key means when `comments`."""
        return "\n".join(_lines(self, comments, "")) + "\n"


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> TrainConfig:
    """The configuration in a YAML file, or in a Python file that defines `config`, with overrides applied.

    Args:
        path: the file; None for the defaults.
        overrides: `key=value` with dotted keys, the value in YAML.

    Raises:
        FileNotFoundError: no such file.
        ValueError: one line for the first mistakes found: unknown keys with the nearest known one, values
            with what is allowed.
    """
    values = read_mapping(Path(path)) if path is not None else {}
    for item in overrides:
        values = _merge(values, parse_override(item))
    return make_config(values, str(path) if path is not None else "the configuration")


def make_config(values: Mapping[str, Any], source: str = "the configuration") -> TrainConfig:
    """A checked configuration from plain values; `source` names them in errors."""
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        found = explain(error.errors(), TrainConfig)
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise ValueError(f"{source}: {'; '.join(found[:3])}{more}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The plain values in a YAML file or in the variable `config` of a Python file."""
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {path}; give an existing .yaml or .py file")
    if path.suffix == ".py":
        values = runpy.run_path(str(path)).get("config")
        if values is None:
            raise ValueError(f"{path} does not define `config`; assign it a dict of the configuration's keys")
        values = values.model_dump() if isinstance(values, TrainConfig) else values
    elif path.suffix in (".yaml", ".yml"):
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    else:
        raise ValueError(f"{path} ends in {path.suffix!r}; a configuration is a .yaml, .yml or .py file")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} holds a {type(values).__name__}; a configuration is a mapping of keys to values"
        )
    return values


def parse_override(item: str) -> dict[str, Any]:
    """`optimizer.lr=3e-4` as nested values."""
    key, equals, text = item.partition("=")
    if not equals or not key.strip() or not all(key.strip().split(".")):
        raise ValueError(f"--set {item}: expected key=value, for example --set optimizer.lr=3e-4")
    try:
        value: Any = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"--set {item}: the value is not YAML; quote it") from None
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return value


# ---- helpers -----------------------------------------------------------------------------------------
def _merge(base: Mapping[str, Any], change: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        if key == "batching" and not depth:
            old, value = _batching(old), _batching(value)
        if isinstance(value, dict) and isinstance(old, dict):
            merged[key] = _merge(old, value, depth + 1)
        else:
            merged[key] = value
    return merged


def _lines(section: Section, comments: bool, indent: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield f"{indent}{name}:"
            yield from _lines(value, comments, indent + "  ")
            continue
        if isinstance(value, tuple):
            value = list(value)
        text = yaml_text(value)
        note = f"  # {field.description}" if comments and field.description else ""
        yield f"{indent}{name}: {text}{note}"
