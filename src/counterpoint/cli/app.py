"""The commands, one file each; a command's module imports the rest of the package only when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from counterpoint.cli.bench import bench
from counterpoint.cli.calibrate import calibrate
from counterpoint.cli.cluster import cluster
from counterpoint.cli.demo import demo
from counterpoint.cli.emulate import emulate, emulate_worker
from counterpoint.cli.export import export
from counterpoint.cli.generate import generate
from counterpoint.cli.plan import plan
from counterpoint.cli.report import report
from counterpoint.cli.reproduce import reproduce, reproduce_worker
from counterpoint.cli.schedule import schedule
from counterpoint.cli.train import train
from counterpoint.cli.verify import verify, verify_worker

app = typer.Typer(
    name="counterpoint",
    help=(
        "Plan, simulate and run parallel training of large language models.\n\n"
        "A strategy is written once, as a schedule; the same schedule is executed on the devices you have "
        "and simulated on the cluster you describe."
    ),
    epilog="Start with: counterpoint demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", "-V", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"counterpoint {installed('counterpoint')}")
        raise typer.Exit


app.command()(train)
app.command()(generate)
app.command()(export)
app.command()(verify)
app.command("verify-worker", hidden=True)(verify_worker)
app.command()(schedule)
app.command()(report)
app.add_typer(cluster, name="cluster")
app.add_typer(plan, name="plan")
app.command()(calibrate)
app.add_typer(bench, name="bench")
app.command()(demo)
app.command()(emulate)
app.command()(reproduce)
app.command("reproduce-worker", hidden=True)(reproduce_worker)
app.command("emulate-worker", hidden=True)(emulate_worker)
