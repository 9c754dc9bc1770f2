"""`counterpoint generate`: text from a model trained here, or from a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    model: Annotated[
        Path, typer.Argument(help="A run's directory, one of its checkpoints, or a Hugging Face directory.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")] = "",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=0)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Keep the likeliest tokens of this total probability."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
) -> None:
    """Sample text from a trained model, in one process.

    counterpoint generate runs/train --prompt "def main" --temperature 0.5
    """
    from counterpoint.training.generate import generate as sample
    from counterpoint.training.trained import load_trained

    decoder, tokenizer = load_trained(model)
    pieces = sample(
        decoder,
        decoder.config,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    typer.echo(prompt, nl=False)
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()
