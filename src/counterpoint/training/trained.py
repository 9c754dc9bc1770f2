"""A trained model read back into one process, with its tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Decoder
from counterpoint.training import checkpoint
from counterpoint.training.export import load_pretrained
from counterpoint.training.mesh import Processes
from counterpoint.training.progress import warn
from counterpoint.training.tokenizer import Tokenizer, load_tokenizer


def load_trained(path: str | Path) -> tuple[Decoder, Tokenizer]:
    """The model, in float32 on the CPU, and the tokenizer of what lies at `path`.

    path: the directory of a run (its newest undamaged checkpoint is read), one of its checkpoints, or a
    Hugging Face directory. Raises ValueError when it is none of these or damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory; give a run's directory or a Hugging Face directory")
    if (path / "config.json").is_file():
        return load_pretrained(path), load_tokenizer(path)
    alone = Processes(0, 1, 0, 1, 0, 1, torch.device("cpu"))
    if (path / "state.json").is_file():
        found, run = path, path.parent.parent
        if fault := checkpoint.check(found, alone):
            raise ValueError(f"{found} is damaged ({fault}); name another checkpoint")
    else:
        found, run = _newest(path, alone), path
    config = ModelConfig.from_dict(checkpoint.read_state(found).model)
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu")
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    checkpoint.load(found, model, None, alone)
    return model, load_tokenizer(run / "tokenizer")


def _newest(run: Path, alone: Processes) -> Path:
    for path in checkpoint.list_checkpoints(run / "checkpoints"):
        fault = checkpoint.check(path, alone)
        if fault is None:
            return path
        warn(f"checkpoint {path} is damaged ({fault}); reading the one before")
    raise ValueError(f"{run}: holds no usable checkpoint and no config.json; give the directory of a run")
