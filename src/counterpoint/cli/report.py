"""`counterpoint report`: the page and the picture of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="The directory of a training run.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page.", show_default="report.html in the run")
    ] = None,
    timelines: Annotated[int, typer.Option(min=0, help="How many recorded timelines to show.")] = 1,
) -> None:
    """Write a self-contained HTML page of a run: loss, timeline, memory, bytes per link, configuration.

    Timelines are recorded at the steps that metrics.timeline_steps names.
    """
    from counterpoint.report.run import report_run

    typer.echo(f"written to {report_run(run, output, timelines=timelines)}")
