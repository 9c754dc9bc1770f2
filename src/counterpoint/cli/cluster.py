"""`counterpoint cluster`: the clusters that come with the package, and those in your files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

cluster = typer.Typer(no_args_is_help=True, help="Show and draw cluster descriptions.")


@cluster.command("list")
def list_all() -> None:
    """List the presets."""
    from rich.console import Console

    from counterpoint.cluster.draw import list_clusters

    list_clusters(Console())


@cluster.command()
def show(
    name: Annotated[str, typer.Argument(help="A preset, or a YAML file.")],
    picture: Annotated[
        Path | None, typer.Option("--picture", "-p", help="Also draw it into this .png or .svg file.")
    ] = None,
) -> None:
    """Describe a cluster: devices, levels, links, and what a pair of ranks gets."""
    from rich.console import Console

    from counterpoint.cluster.draw import show as describe

    described = describe(name, Console())
    if picture is not None:
        from counterpoint.cluster.picture import draw

        draw(described, picture)
        typer.echo(f"drawn into {picture}")
