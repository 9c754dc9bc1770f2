"""`counterpoint reproduce`: what a published system claims, and what comes out here."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Only(StrEnum):
    exact = "exact"
    bytes = "bytes"
    simulated = "simulated"
    emulated = "emulated"
    measured = "measured"


def reproduce(
    name: Annotated[
        str | None, typer.Argument(help="A system: tokenring, ulysses, rsa, streambp; see --list.")
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="List all systems with their state.")] = False,
    only: Annotated[list[Only] | None, typer.Option(help="Only checks of this kind (repeatable).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Check what a published system claims: claim, what came out, and the difference.

    exact: results and gradients on local processes equal those of one process. bytes: what a strategy sends or keeps
    equals the formulas. simulated: times on a description of the published machine. Exit code 1 when something falls
    outside its stated tolerance; a figure that does not come out is printed as it is, with the reason.

        counterpoint reproduce tokenring --only simulated
    """
    if list_all == (name is not None):
        raise ValueError("give the name of a system, or --list to see them all")

    import json

    from rich.console import Console

    from counterpoint.reproductions import show

    # a pipe has no width: tables that were cut to 80 columns could not be read
    console = Console() if Console().is_terminal else Console(width=140)
    if name is None:
        if as_json:
            typer.echo(json.dumps(show.systems_json(), indent=1))
        else:
            console.print(show.systems_table())
        return

    from counterpoint.reproductions.bench import Bench
    from counterpoint.reproductions.check import holds, run
    from counterpoint.reproductions.registry import find, load

    system = find(name)
    wanted = set(map(str, only or Only))
    checks = [check for check in load(system).checks if check.kind in wanted]
    if not checks:
        kinds = ", ".join(load(system).kinds())
        raise ValueError(f"{system.name} has no checks that are {', '.join(sorted(wanted))}; it has {kinds}")
    results = []
    with Console(stderr=True).status("") as status:
        found = run(checks, Bench(os.environ))
        for number, check in enumerate(checks, 1):
            status.update(f"{number} of {len(checks)}, {check.kind}: {check.claim}")
            results.append(next(found))
    if as_json:
        typer.echo(json.dumps(show.results_json(system, results), indent=1))
    else:
        console.print(show.results_table(system, results))
    raise typer.Exit(0 if holds(results) else 1)


def reproduce_worker(plan: Path) -> None:
    """One local process of `reproduce`."""
    from counterpoint.reproductions.worker import run_cases
    from counterpoint.training.launch import worker_from

    worker = worker_from(os.environ)
    if worker is None:
        raise ValueError("reproduce-worker is started by reproduce; run counterpoint reproduce")
    run_cases(worker, plan)
