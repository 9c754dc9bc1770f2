"""Proof on the spot: the loss and gradients of the processes of a run equal those of one process."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from counterpoint.model.decoder import Decoder
from counterpoint.planner.batch import BatchPlan, Group, MicroBatch
from counterpoint.training.config import TrainConfig
from counterpoint.training.corpus import Corpus
from counterpoint.training.launch import Worker
from counterpoint.training.mesh import Processes, open_processes
from counterpoint.training.model import check_attention, check_memory, model_config
from counterpoint.training.ragged.lengths import check_batching, read_lengths
from counterpoint.training.ragged.source import Planner, RaggedBatches
from counterpoint.training.ragged.step import RaggedBatch, ragged_gradients
from counterpoint.training.start import first_model, frozen_reference
from counterpoint.training.step import Stream, own_sequences, sequence_loss, shard, units
from counterpoint.training.tokenizer import Tokenizer
from counterpoint.training.trainer import (
    open_documents,
    open_ragged,
    open_stream,
    prepare_tokenizer,
    start_planner,
)

TOLERANCE = 2e-5  # relative, float32
# Loss and gradients of a global batch, and its plan if it is ragged.
Measured = tuple[float, dict[str, Tensor], BatchPlan | None]
Measure = Callable[[Decoder, Decoder | None, Processes], Measured]


@dataclass(frozen=True, slots=True)
class Difference:
    """What the sharded model gave, what one process gave, and how far apart they are, relative to the latter."""

    name: str
    sharded: float
    single: float
    relative: float


@dataclass(frozen=True, slots=True)
class Verification:
    """Differences of the loss and of the gradient of every parameter (its norm is shown).

    plan: of a ragged batch, in words.
    """

    tokens: int
    differences: tuple[Difference, ...]
    tolerance: float = TOLERANCE
    plan: str = ""

    @property
    def worst(self) -> Difference:
        return max(self.differences, key=lambda d: d.relative)

    @property
    def holds(self) -> bool:
        return self.worst.relative <= self.tolerance

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> Verification:
        data = json.loads(path.read_text())
        return cls(
            data["tokens"],
            tuple(Difference(**d) for d in data["differences"]),
            data["tolerance"],
            data["plan"],
        )


def verify(config: TrainConfig, worker: Worker | None = None) -> int:
    """Compare one global batch on the initial weights, in float32; writes `verification.json` on the first rank.

    Returns 0 when everything agrees within the tolerance, else 1.
    """
    with open_processes(config.processes, worker) as processes, ExitStack() as closing:
        directory = Path(config.directory)
        corpus = open_documents(config)
        tokenizer = prepare_tokenizer(config, corpus, directory / "tokenizer", processes)
        shape = model_config(config.model, tokenizer.vocab_size)
        check_attention(config, shape)
        check_memory(config, shape, processes.device.type)
        check_batching(config, shape)
        corpus = corpus.split("train")
        planner = closing.enter_context(start_planner(config, shape, processes))
        measure: Measure
        if config.batching.ragged:
            measure = _ragged(config, corpus, tokenizer, planner, processes)
        else:
            measure = partial(_gradients, partial(open_stream, config, corpus, tokenizer), config)
        alone = Processes(0, 1, 0, 1, 0, 1, torch.device("cpu"))
        reference = frozen_reference(config, shape, processes)
        model = shard(first_model(config, shape), config, processes)
        loss, gradients, plan = measure(model, reference, processes)

        def compare() -> bool:
            reference = frozen_reference(config, shape, alone)
            single_loss, expected, _ = measure(first_model(config, shape), reference, alone)
            found = [Difference("loss", loss, single_loss, abs(loss - single_loss) / abs(single_loss))]
            for name, gradient in expected.items():
                norm = float(gradient.norm())
                apart = float((gradients[name] - gradient).norm()) / max(norm, 1e-30)
                found.append(Difference(name, float(gradients[name].norm()), norm, apart))
            tokens = plan.tokens if plan else config.training.global_batch * config.data.sequence_length
            result = Verification(tokens, tuple(found), plan=describe(plan) if plan else "")
            result.write(directory / "verification.json")
            return result.holds

        return 0 if processes.first(compare) else 1


def _gradients(
    opened: Callable[[], Stream],
    config: TrainConfig,
    model: Decoder,
    reference: Decoder | None,
    processes: Processes,
) -> Measured:
    """Mean loss of a global batch, and its gradients, whole on every rank."""
    batches = list(own_sequences(opened(), config.training.global_batch, processes))
    (count,) = processes.sum(units(batches, config, processes))
    losses = 0.0
    for batch in batches:
        loss = sequence_loss(model, batch, config, processes, reference)
        (loss * (processes.world_size / count)).backward()
        losses += float(loss.detach())
    (total,) = processes.sum(losses)
    return total / count, _whole(model), None


def _ragged(
    config: TrainConfig, corpus: Corpus, tokenizer: Tokenizer, planner: Planner | None, processes: Processes
) -> Measure:
    """The same of a ragged batch: by its plan on many processes, one sequence after the other on one."""
    batching = config.batching
    if batching.lengths is None:
        lengths = random_lengths(config.data.sequence_length, config.training.seed)
    else:
        lengths = tuple(read_lengths(batching.lengths).values())
    stream = open_ragged(config, corpus, tokenizer, lengths)
    drawn = next(RaggedBatches(stream, planner, processes, 0))

    def measure(model: Decoder, reference: Decoder | None, processes: Processes) -> Measured:
        batch = drawn
        if processes.world_size == 1:
            alone = tuple(MicroBatch((Group((0,), (i,)),)) for i in range(len(drawn.places)))
            batch = RaggedBatch(drawn.places, BatchPlan(drawn.plan.lengths, 1, alone, "one process"))
        losses, count, _ = ragged_gradients(model, batch, stream, config, processes)
        (total,) = processes.sum(losses)
        return total / count, _whole(model), batch.plan

    return measure


def random_lengths(longest: int, seed: int, count: int = 1024) -> tuple[int, ...]:
    """Lengths from 1 to `longest`, each order of magnitude as likely, the longest among the first."""
    rng = random.Random(seed)
    found = [int((longest + 1) ** rng.random()) for _ in range(count)]
    return (*found[:1], longest, *found[1:])


def describe(plan: BatchPlan) -> str:
    """How many sequences, and the groups that share them."""
    count = Counter(len(group.ranks) for row in plan.micro_batches for group in row.groups)
    sizes = ", ".join(f"{count[size]} of {size}" for size in sorted(count))
    return (
        f"{len(plan.lengths)} sequences of {min(plan.lengths):,} to {max(plan.lengths):,} tokens, planned by "
        f"{plan.solver}: groups by processes {sizes}"
    )


def _whole(model: Decoder) -> dict[str, Tensor]:
    """The gradients of a model, whole on every rank."""
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return gradients
