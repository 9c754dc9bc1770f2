"""`counterpoint plan batch`: who computes which sequences of a ragged batch, together with whom."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class GroupStrategy(StrEnum):
    ulysses = "ulysses"
    ring = "ring"


class State(StrEnum):
    zero1 = "zero1"
    zero3 = "zero3"


def batch(
    model: Annotated[str, typer.Option(help="A Hugging Face config.json, its directory, or a preset.")],
    cluster: Annotated[str, typer.Option(help="A preset (counterpoint cluster list) or a YAML file.")],
    lengths: Annotated[
        Path | None, typer.Option(help="A file of lengths: a JSON list, or numbers between blanks.")
    ] = None,
    distribution: Annotated[
        str | None,
        typer.Option(help="Synthetic lengths: wikipedia-like, commoncrawl-like, github-like, byted-like."),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences to draw.")] = 512,
    context: Annotated[
        int | None, typer.Option(min=1, help="Longest context: cuts drawn lengths, sizes the static plan.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the drawn lengths and the MILP.")] = 0,
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks to use.", show_default="all")] = None,
    strategy: Annotated[
        GroupStrategy, typer.Option(help="How a group shares sequences; beyond the heads always ring.")
    ] = GroupStrategy.ulysses,
    state: Annotated[
        State, typer.Option(help="zero3: micro-batches are synchronous; zero1: ranks go on by themselves.")
    ] = State.zero3,
    recompute: Annotated[bool, typer.Option(help="Layers keep their input alone and run again.")] = False,
    tokens_per_rank: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens a rank holds.", show_default="what its memory takes"),
    ] = None,
    solver: Annotated[
        list[str] | None, typer.Option(help="Only this solver (repeatable).", show_default="all")
    ] = None,
    effort: Annotated[int, typer.Option(min=0, help="Of FlexSP's MILP, per micro-batch; 0: none.")] = 100,
    workers: Annotated[int, typer.Option(min=0, help="Processes for FlexSP's MILPs.")] = 2,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Save the best plan (JSON).")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw static and best plan as .png or .svg.")] = None,
    export_mps: Annotated[
        Path | None, typer.Option(help="Write FlexSP's MILPs with their best values to this folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Plan a batch of sequences of different lengths with every solver, and say which plan is fastest and why.

    counterpoint plan batch --model smollm2-135m --cluster dgx-a100 --distribution github-like --sequences 64
    """
    from rich.console import Console

    from counterpoint.cluster.presets import find_cluster
    from counterpoint.planner.batch_cost import BatchCost
    from counterpoint.planner.batch_solvers.flexsp import FlexspOptions
    from counterpoint.planner.lengths import find_distribution, read_lengths
    from counterpoint.planner.plan_batch import plan_batch, reason, solvers
    from counterpoint.report.figure import check_path
    from counterpoint.training.model import model_config

    if (lengths is None) == (distribution is None):
        raise ValueError("give either --lengths FILE or --distribution NAME")
    if picture is not None:
        check_path(picture)
    config, place = model_config(model, None), find_cluster(cluster)
    cost = BatchCost(
        config, place, ranks or place.world_size, strategy.value, state.value, recompute,
        tokens_per_rank=tokens_per_rank,
    )  # fmt: skip
    if lengths is not None:
        drawn = read_lengths(lengths)
    else:
        assert distribution is not None
        drawn = find_distribution(distribution).draw(sequences, context or 32768, seed)
    options = FlexspOptions(effort=effort, seed=seed)
    known = solvers(cost, context=context, options=options, workers=workers)
    unknown = [name for name in solver or () if name not in known]
    if unknown:
        raise ValueError(f"no solver '{unknown[0]}'; there are {', '.join(known)}")
    chosen = {name: known[name] for name in known if not solver or name in solver}
    with Console(stderr=True).status("") as status:
        status.update("fitting costs to simulated schedules")
        answers = plan_batch(drawn, cost, chosen, lambda name: status.update(f"planning: {name}"))
        exported = _export(drawn, cost, options, export_mps) if export_mps is not None else []
    best = answers[0]
    assert best.plan is not None
    if plan_file is not None:
        plan_file.write_text(json.dumps(best.plan.to_json()))
    if picture is not None:
        from counterpoint.report.batch_picture import draw_plans

        shown = [a for a in answers if a.solver == "static" and a is not best and a.plan] + [best]
        draw_plans([(a.plan, a.prediction) for a in shown], picture)  # type: ignore[misc]
    if as_json:
        found = {
            "model": model, "cluster": place.name, "ranks": cost.ranks, "lengths": drawn, "strategy": strategy.value,
            "state": state.value, "recompute": recompute, "tokens_per_rank": cost.capacity, "reason": reason(answers),
            "answers": [a.to_json() for a in answers], "exported": [str(p) for p in exported],
        }  # fmt: skip
        typer.echo(json.dumps(found, indent=1))
        return
    _print(answers, cost, drawn, reason(answers))
    for what, path in (("plan", plan_file), ("picture", picture), ("MILPs", export_mps)):
        if path is not None:
            typer.echo(f"{what}: {path}")


def _export(drawn, cost, options, folder: Path) -> list[Path]:
    from counterpoint.planner.milp_library import export_flexsp

    return export_flexsp(drawn, cost, options, folder)


def _print(answers, cost, drawn, why: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from counterpoint.planner.plan_batch import sizes

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file or a pipe has no width; do not cut names
    title = (
        f"{len(drawn):,} sequences of {min(drawn):,} to {max(drawn):,} tokens, {sum(drawn):,} in all, on {cost.ranks} "
        f"ranks of {cost.cluster.name} that hold {cost.capacity:,} tokens each ({cost.strategy}, {cost.state})"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("solver", no_wrap=True)
    for name in ("seconds", "to best", "compute", "comm.", "idle", "GB", "micro-b.", "planned in s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("groups (ranks x number)")
    best = answers[0].prediction.seconds
    for a in answers:
        if a.plan is None:
            continue
        p, groups = a.prediction, [f"{size}x{count}" for size, count in sizes(a.plan).items()]
        more = f" and {len(groups) - 7} sizes" if len(groups) > 7 else ""
        table.add_row(
            a.solver, f"{p.seconds:.3f}", f"{p.seconds / best:.2f}x", f"{p.compute:.3f}", f"{p.communication:.3f}",
            f"{p.idle:.3f}", f"{p.memory_bytes / 1e9:.1f}", str(len(a.plan.micro_batches)), f"{a.plan_seconds:.2f}",
            " ".join(groups[:7]) + more,
        )  # fmt: skip
    console.print(table)
    console.print("seconds: a batch forward and backward; compute, communication and idle: mean over ranks\n")
    console.print(f"Why the first:\n{why}", highlight=False, markup=False)
    for a in answers:
        if a.plan is None:
            console.print(f"left out: {a.solver}: {a.error}", style="dim", markup=False, highlight=False)
