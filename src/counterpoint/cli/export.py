"""`counterpoint export`: a trained model as a Hugging Face directory."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    """Type of the weights in the files."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def export(
    model: Annotated[Path, typer.Argument(help="A run's directory, or one of its checkpoints.")],
    directory: Annotated[Path, typer.Argument(help="Where to write; an earlier export there is replaced.")],
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights in the files.")] = Dtype.float32,
) -> None:
    """Write a model as a Hugging Face directory: config.json, model.safetensors, tokenizer.

    transformers loads it: AutoModelForCausalLM.from_pretrained(directory). It has no class for models with linear
    attention layers; counterpoint reads those back (generate, export, load_pretrained).
    """
    import torch

    from counterpoint.training.export import export as write
    from counterpoint.training.trained import load_trained

    decoder, tokenizer = load_trained(model)
    path = write(decoder, decoder.config, tokenizer, directory, dtype=getattr(torch, dtype.value))
    if decoder.config.linear is not None:
        typer.echo(
            f"note: transformers has no class for model_type {decoder.config.model_type} (linear attention layers); "
            "read this directory with counterpoint",
            err=True,
        )
    typer.echo(f"wrote {decoder.config.parameters():,} parameters to {path}")
