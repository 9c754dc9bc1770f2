"""In which dtype a run computes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from counterpoint.training.config import TrainConfig
from counterpoint.training.mesh import Processes


def computes_in_half(config: TrainConfig, processes: Processes) -> bool:
    """Whether the model computes in bfloat16."""
    wanted = config.training.precision
    return wanted == "bfloat16" or (wanted == "auto" and processes.device.type == "cuda")


def precision(config: TrainConfig, processes: Processes) -> AbstractContextManager[Any]:
    """What a forward pass runs in: over several processes FSDP casts, a single one uses autocast."""
    if processes.state is None and computes_in_half(config, processes):
        return torch.autocast(processes.device.type, torch.bfloat16)
    return nullcontext()
