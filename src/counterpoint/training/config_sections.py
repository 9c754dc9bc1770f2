"""Sections of a training configuration: how memory is used, what is trained on, how batches are made."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from counterpoint.strategies.memory.policy import MemoryPolicy, parse_layers


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _layer_policies(value: Any) -> Any:
    if not isinstance(value, str | list | tuple) or not all(isinstance(x, str) for x in value):
        return value
    return tuple(str(policy) for policy in parse_layers(value))


class MemoryConfig(Section):
    layers: Annotated[tuple[str, ...], BeforeValidator(_layer_policies)] = Field(
        ("keep",),
        min_length=1,
        description="keep, recompute, stream(CHUNKS), offload (as much as computing hides) or offload(RATIO): "
        "one for all layers, or a list with one each",
    )
    mlp_tiles: int = Field(1, ge=1, description="pieces of the sequence that an MLP works on one by one")
    head_tokens: int | None = Field(
        1024, ge=1, description="tokens whose logits exist at a time in head and loss; null: all"
    )
    cluster: str | None = Field(
        None,
        min_length=1,
        description="preset or file whose figures say how much offload can hide; null: this machine, as calibrated",
    )

    @property
    def policy(self) -> MemoryPolicy:
        return MemoryPolicy(parse_layers(self.layers), self.mlp_tiles, self.head_tokens)


class LossConfig(Section):
    objective: Literal["pretrain", "sft", "dpo", "grpo"] = Field(
        "pretrain", description="what is trained on: all text, completions, preferences or rewarded groups"
    )
    beta: float = Field(0.1, gt=0, description="dpo: how strongly the policy is held to the reference")
    clip: float = Field(0.2, gt=0, lt=1, description="grpo: how far a probability ratio counts, 1 +- clip")
    kl: float = Field(0.04, ge=0, description="grpo: weight of the divergence from the reference; 0: none")
    reference: str | None = Field(
        None, min_length=1, description="dpo, grpo: directory of the frozen model; null: where training began"
    )


class BatchingConfig(Section):
    solver: Literal["none", "static", "dynamic_cp", "flexsp", "bytescale"] = Field(
        "none", description="none: packed sequences of one length; else who plans batches of whole documents"
    )
    tokens: int | None = Field(
        None, ge=1, description="most tokens of a batch of documents; null: global_batch x sequence_length"
    )
    sequences: int | None = Field(None, ge=1, description="documents of a batch, in the place of tokens")
    lengths: str | None = Field(
        None, min_length=1, description="a file with lengths, one a line: text is cut into such sequences"
    )
    tokens_per_rank: int | None = Field(
        None, ge=1, description="tokens a process can hold; null: sequence_length / parallel.sequence"
    )
    cluster: str | None = Field(
        None, min_length=1, description="preset or file to plan for; null: this machine, by rough figures"
    )
    ahead: int = Field(2, ge=0, description="batches that are planned ahead of the next one")
    workers: int = Field(1, ge=1, description="processes that plan")

    @property
    def ragged(self) -> bool:
        """Whether batches hold whole documents, each step by its own plan."""
        return self.solver != "none"

    @model_validator(mode="after")
    def _check(self) -> BatchingConfig:
        if self.tokens is not None and self.sequences is not None:
            raise ValueError(
                f"batching.tokens = {self.tokens} and batching.sequences = {self.sequences}: a batch is measured in "
                "one of them; leave the other out"
            )
        useless = [name for name in ("tokens", "sequences", "lengths") if getattr(self, name) is not None]
        if useless and not self.ragged:
            raise ValueError(
                f"batching.{useless[0]} is for ragged batches, and batching.solver is none; name a solver"
            )
        return self
