"""`counterpoint train`: a run of the trainer, over workers that it starts itself or that torchrun started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[
        Path | None,
        typer.Argument(help="A YAML file, or a Python file that defines `config`.", show_default="defaults"),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one key, e.g. optimizer.lr=3e-4."),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Local workers to start.", show_default="data x sequence"),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on which the workers meet; 0: a free one.")
    ] = 0,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print every key with its value and meaning, and exit.")
    ] = False,
) -> None:
    """Train a model, or resume the run in its directory.

    Starts one local worker per place of the mesh data x sequence. Under torchrun, uses its workers:

        torchrun --nproc-per-node 4 -m counterpoint train run.yaml

    Ctrl-C finishes the step and saves a checkpoint; the same command resumes, on any number of workers.
    """
    from counterpoint.files import scratch
    from counterpoint.training.config import load_config
    from counterpoint.training.launch import launch, worker_from

    settings = load_config(config, overrides or ())
    if print_config:
        typer.echo(settings.to_yaml(comments=True), nl=False)
        return
    worker = worker_from(os.environ)
    if worker is not None:
        if nproc is not None:
            raise ValueError("--nproc starts workers, but torchrun has started them; leave it out")
        settings = settle(settings.with_world_size(worker.world_size), say=worker.rank == 0)
        _finish(worker, settings)
        return
    data = 1 if settings.parallel.data == "auto" else settings.parallel.data
    world_size = nproc or data * settings.parallel.sequence_size
    settings = settings.with_world_size(world_size)
    check(settings)
    settings = settle(settings)
    if world_size == 1:
        _finish(None, settings)
        return

    with scratch() as folder:
        resolved = Path(folder, "config.yaml")
        resolved.write_text(settings.to_yaml())
        code = launch(["-m", "counterpoint", "train", str(resolved)], world_size, os.environ, port)
    raise typer.Exit(code)


def check(settings) -> None:
    """Finds mistakes in what a configuration points to before any worker starts; ValueError or OSError."""
    from counterpoint.training.model import check_attention, check_memory, model_config
    from counterpoint.training.ragged.lengths import check_batching

    shape = model_config(settings.model)
    check_attention(settings, shape)
    check_memory(settings, shape, _device() if "offload" in " ".join(settings.memory.layers) else None)
    check_batching(settings, shape)
    if settings.batching.ragged:
        from counterpoint.training.ragged.planning import batch_cost

        batch_cost(settings, shape, settings.processes.sequence_size).group((0,))


def settle(settings, say: bool = True):
    """The settings with the ratio that is left open in memory.layers, which is said in a line."""
    if "offload" not in settings.memory.layers:
        return settings
    from counterpoint.training.model import check_memory, model_config
    from counterpoint.training.offload import figures, settle_offload

    shape = model_config(settings.model)
    check_memory(settings, shape, _device())
    settings, line = settle_offload(settings, shape, lambda: figures(settings, os.environ))
    if say:
        typer.echo(line)
    return settings


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _finish(worker, settings) -> None:
    from counterpoint.training.trainer import train

    raise typer.Exit(train(settings, worker))
