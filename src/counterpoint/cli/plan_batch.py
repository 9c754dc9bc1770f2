"""`counterpoint plan batch`: who computes which sequences of a ragged batch, together with whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from counterpoint.cli import batch_options as options
from counterpoint.cli.batch_table import Asked, plan_asked, print_json, print_table


def batch(
    model: Annotated[str, typer.Option(help="A Hugging Face config.json, its directory, or a preset.")],
    cluster: Annotated[str, typer.Option(help="A preset (counterpoint cluster list) or a YAML file.")],
    lengths: options.Lengths = None,
    distribution: options.Distribution = None,
    sequences: options.Sequences = 512,
    context: options.Context = None,
    seed: options.Seed = 0,
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks to use.", show_default="all")] = None,
    strategy: options.Strategy = None,
    linear: options.LinearStrategy = None,
    state: options.Sharding = options.State.zero3,
    recompute: options.Recompute = False,
    tokens_per_rank: options.TokensPerRank = None,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    solver: options.Solvers = None,
    effort: options.Effort = 100,
    workers: options.Workers = 2,
    top: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 12,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Save the best plan (JSON).")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw static and best plan as .png or .svg.")] = None,
    export_mps: Annotated[
        Path | None, typer.Option(help="Write FlexSP's MILPs with their best values to this folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Plan a batch of sequences of different lengths with every solver, and say which plan is fastest and why.

    For a model with layers of several types (linear attention, windows) every plan is answered for with every strategy
    of each type.

    counterpoint plan batch --model smollm2-135m --cluster dgx-a100 --distribution github-like --sequences 64
    """
    from counterpoint.report.figure import check_path

    if picture is not None:
        check_path(picture)
    asked = Asked(
        model, cluster, lengths, distribution, sequences, context, seed, ranks, strategy or (), linear or (),
        state.value, recompute, tokens_per_rank, dtype, solver or (), effort, workers,
    )  # fmt: skip
    planned = plan_asked(asked)
    best = planned.answers[0]
    assert best.plan is not None
    exported = _export(asked, planned, export_mps) if export_mps is not None else []
    if plan_file is not None:
        plan_file.write_text(json.dumps(best.plan.to_json()))
    if picture is not None:
        from counterpoint.report.batch_picture import draw_plans

        alike = [a for a in planned.answers if a.plan and a.strategies == best.strategies]
        shown = [a for a in alike if a.solver == "static" and a is not best] + [best]
        draw_plans([(a.plan, a.prediction) for a in shown], picture)  # type: ignore[misc]
    if as_json:
        print_json(asked, planned, exported=[str(path) for path in exported])
        return
    print_table(planned, top)
    for what, path in (("plan", plan_file), ("picture", picture), ("MILPs", export_mps)):
        if path is not None:
            typer.echo(f"{what}: {path}")


def _export(asked: Asked, planned, folder: Path) -> list[Path]:
    from counterpoint.planner.batch_solvers.flexsp import FlexspOptions
    from counterpoint.planner.milp_library import export_flexsp

    settings = FlexspOptions(effort=asked.effort, seed=asked.seed)
    return export_flexsp(planned.lengths, planned.cost, settings, folder)
