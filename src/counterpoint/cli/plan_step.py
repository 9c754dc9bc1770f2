"""`counterpoint plan step`: a training step, predicted before it runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer


def step(
    config: Annotated[
        Path | None, typer.Argument(help="A configuration of the trainer.", show_default="defaults")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one key, e.g. parallel.sequence=4."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="A preset or a YAML file.", show_default="this machine, measured"),
    ] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure this machine again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Predict time, speed, memory and exposed communication of a training step.

    counterpoint plan step --set model=smollm2-135m --set parallel.sequence=4 --cluster dgx-h100
    """
    from rich.console import Console
    from rich.table import Table

    from counterpoint.cluster.presets import find_cluster
    from counterpoint.training.config import load_config
    from counterpoint.training.predict import predict_here, predict_on

    settings = load_config(config, overrides or ())
    if cluster is None:
        found = predict_here(settings, os.environ, refresh)
    else:
        found = predict_on(settings, find_cluster(cluster))
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
        return
    one, console = found.step, Console()
    console.print(
        f"{one.tokens_per_step:,} tokens a step on {one.world_size} ranks of {found.cluster}, {one.dtype}: "
        f"[bold]{found.seconds:.4g} s[/bold], {found.tokens_per_second:,.0f} tokens/s, "
        f"{found.exposed_seconds:.3g} s of communication exposed, {found.peak_bytes / 1e6:,.0f} MB on the fullest rank "
        f"({found.state_bytes / 1e6:,.0f} MB of them parameters and moments)",
        highlight=False,
    )
    table = Table("phase", "seconds", "share")
    for name, seconds in found.phases.items():
        table.add_row(name, f"{seconds:.4g}", f"{seconds / found.seconds:.1%}")
    console.print(table)
    if not found.whole:
        console.print(
            f"simulated with {found.layers} layers, {found.sequences} sequences; the others counted"
        )
