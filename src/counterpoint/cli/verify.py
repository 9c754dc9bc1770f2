"""`counterpoint verify`: does a configuration compute on many processes what it computes on one?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def verify(
    config: Annotated[
        Path | None, typer.Argument(help="A configuration as for train.", show_default="defaults")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one key, e.g. parallel.sequence=4."),
    ] = None,
) -> None:
    """Prove that loss and gradients of the sharded model equal those of a single process.

    Runs one global batch of a training configuration on its processes and again on one, on the same initial
    weights, and compares the loss and the gradient of every parameter. Exit code 1 when they differ by more than
    2e-5 relative. With batching the sequences have random lengths (others by training.seed), unless
    batching.lengths says which.

        counterpoint verify --set parallel.sequence=4 --set data.sequence_length=4096

        counterpoint verify --set batching=flexsp --set parallel.data=4 --set batching.tokens_per_rank=256
    """
    from counterpoint.cli.train import check, settle
    from counterpoint.training.config import load_config
    from counterpoint.training.launch import worker_from

    settings = load_config(config, overrides or ())
    worker = worker_from(os.environ)
    if worker is not None:
        from counterpoint.training.verify import verify as run

        raise typer.Exit(run(settings.with_world_size(worker.world_size), worker))
    check(settings)
    settings = settle(settings)
    raise typer.Exit(0 if prove(settings) else 1)


def prove(settings) -> bool:
    """Run the comparison on local workers, print it, and say whether it holds."""
    from rich.console import Console

    from counterpoint.cli.tables import verification_table
    from counterpoint.files import scratch
    from counterpoint.training.launch import launch
    from counterpoint.training.verify import Verification
    from counterpoint.training.verify import verify as run

    data = settings.parallel.data
    if data == "auto":  # ragged batches are shared by any processes: two show it
        data = 2 if settings.batching.ragged and settings.parallel.sequence_size == 1 else 1
    settings = settings.with_world_size(data * settings.parallel.sequence_size)
    world_size = settings.parallel.data * settings.parallel.sequence_size
    directory = Path(settings.directory)
    directory.mkdir(parents=True, exist_ok=True)
    if world_size == 1:
        run(settings)
    else:
        with scratch() as folder:
            file = Path(folder, "config.yaml")
            file.write_text(settings.to_yaml())
            launch(["-m", "counterpoint", "verify-worker", str(file)], world_size, os.environ)
    result = Verification.read(directory / "verification.json")
    Console().print(verification_table(result, world_size))
    return result.holds


def verify_worker(config: Path) -> None:
    """One worker of `verify`; its verdict is in the file it leaves, so differences are no failure of the worker."""
    from counterpoint.training.config import load_config
    from counterpoint.training.launch import worker_from
    from counterpoint.training.verify import verify as run

    worker = worker_from(os.environ)
    if worker is None:
        raise ValueError("verify-worker is started by verify; run counterpoint verify")
    run(load_config(config), worker)
