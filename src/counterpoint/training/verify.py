"""Proof on the spot: the loss and gradients of the processes of a run equal those of one process."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from counterpoint.model.decoder import Decoder
from counterpoint.training.config import TrainConfig
from counterpoint.training.launch import Worker
from counterpoint.training.mesh import Processes, open_processes
from counterpoint.training.model import check_attention, check_memory, model_config
from counterpoint.training.start import first_model, frozen_reference
from counterpoint.training.step import own_sequences, sequence_loss, shard, units
from counterpoint.training.trainer import open_documents, open_stream, prepare_tokenizer

TOLERANCE = 2e-5  # relative, float32


@dataclass(frozen=True, slots=True)
class Difference:
    """What the sharded model gave, what one process gave, and how far apart they are, relative to the latter."""

    name: str
    sharded: float
    single: float
    relative: float


@dataclass(frozen=True, slots=True)
class Verification:
    """Differences of the loss and of the gradient of every parameter (its norm is shown)."""

    tokens: int
    differences: tuple[Difference, ...]
    tolerance: float = TOLERANCE

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
        return cls(data["tokens"], tuple(Difference(**d) for d in data["differences"]), data["tolerance"])


def verify(config: TrainConfig, worker: Worker | None = None) -> int:
    """Compare one global batch on the initial weights, in float32; writes `verification.json` on the first rank.

    Returns 0 when everything agrees within the tolerance, else 1.
    """
    with open_processes(config.parallel, worker) as processes:
        directory = Path(config.directory)
        corpus = open_documents(config)
        tokenizer = prepare_tokenizer(config, corpus, directory / "tokenizer", processes)
        shape = model_config(config.model, tokenizer.vocab_size)
        check_attention(config, shape)
        check_memory(config, shape, processes.device.type)
        batch = partial(open_stream, config, corpus.split("train"), tokenizer)
        alone = Processes(0, 1, 0, 1, 0, 1, torch.device("cpu"))
        reference = frozen_reference(config, shape, processes)
        model = shard(first_model(config, shape), config, processes)
        loss, gradients = _gradients(model, reference, batch(), config, processes)

        def compare() -> bool:
            reference = frozen_reference(config, shape, alone)
            single_loss, expected = _gradients(first_model(config, shape), reference, batch(), config, alone)
            found = [Difference("loss", loss, single_loss, abs(loss - single_loss) / abs(single_loss))]
            for name, gradient in expected.items():
                norm = float(gradient.norm())
                apart = float((gradients[name] - gradient).norm()) / max(norm, 1e-30)
                found.append(Difference(name, float(gradients[name].norm()), norm, apart))
            tokens = config.training.global_batch * config.data.sequence_length
            result = Verification(tokens, tuple(found))
            result.write(directory / "verification.json")
            return result.holds

        return 0 if processes.first(compare) else 1


def _gradients(
    model: Decoder, reference: Decoder | None, stream, config: TrainConfig, processes: Processes
) -> tuple[float, dict[str, Tensor]]:
    """Mean loss of a global batch, and its gradients, whole on every rank."""
    batches = list(own_sequences(stream, config.training.global_batch, processes))
    (count,) = processes.sum(units(batches, config, processes))
    losses = 0.0
    for batch in batches:
        loss = sequence_loss(model, batch, config, processes, reference)
        (loss * (processes.world_size / count)).backward()
        losses += float(loss.detach())
    (total,) = processes.sum(losses)
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return total / count, gradients
