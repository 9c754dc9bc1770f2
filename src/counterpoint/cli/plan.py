"""`counterpoint plan`: choose by simulation."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from counterpoint.cli import batch_options as options
from counterpoint.cli.batch_table import Asked, plan_asked, print_json, print_table
from counterpoint.cli.plan_batch import batch
from counterpoint.cli.plan_memory import memory
from counterpoint.cli.plan_step import step

plan = typer.Typer(no_args_is_help=True, help="Choose a strategy, or a plan of a batch, by simulation.")


class Phase(StrEnum):
    train = "train"
    prefill = "prefill"


@plan.callback()
def _plan() -> None:
    pass


plan.command()(memory)
plan.command()(step)


@plan.command()
def attention(
    model: Annotated[str, typer.Option(help="A Hugging Face config.json, its directory, or a preset.")],
    cluster: Annotated[str, typer.Option(help="A preset (counterpoint cluster list) or a YAML file.")],
    tokens: Annotated[
        int | None, typer.Option(min=1, help="New tokens, over all ranks, in sequences of one length.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks that share the sequence.", show_default="all")
    ] = None,
    cached: Annotated[int, typer.Option(min=0, help="Tokens whose keys and values are on the ranks.")] = 0,
    phase: Annotated[
        Phase, typer.Option(help="train: forward and backward; prefill: forward.")
    ] = Phase.train,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    causal: Annotated[bool, typer.Option()] = True,
    lengths: options.Lengths = None,
    distribution: options.Distribution = None,
    sequences: options.Sequences = 512,
    context: options.Context = None,
    seed: options.Seed = 0,
    strategy: options.Strategy = None,
    linear: options.LinearStrategy = None,
    state: options.Sharding = options.State.zero3,
    recompute: options.Recompute = False,
    tokens_per_rank: options.TokensPerRank = None,
    solver: options.Solvers = None,
    effort: options.Effort = 100,
    workers: options.Workers = 2,
    top: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 12,
    page: Annotated[
        Path | None,
        typer.Option("--report", help="Write a page with the first answer's simulated timelines."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Rank the attention strategies for a model on a cluster, with the reason for the first.

    For a model with layers of several types (linear attention, windows): the cost of each, and of the whole model with
    the changes of layout between them.

    With --lengths or --distribution in the place of --tokens: sequences of different lengths, in the table that `plan
    batch` gives, with the options from --sequences to --workers.

    counterpoint plan attention --model smollm2-135m --cluster a10x4-pcie --tokens 24000
    """
    from rich.console import Console
    from rich.progress import Progress

    from counterpoint.cli.plan_mixed import answer_mixed
    from counterpoint.cluster.presets import find_cluster
    from counterpoint.planner.attention import Question, plan_attention
    from counterpoint.planner.mixed import MixedQuestion
    from counterpoint.strategies.sequence.blocks import AttentionShape
    from counterpoint.training.model import model_config

    if lengths is not None or distribution is not None:
        if tokens is not None:
            raise ValueError("give either --tokens or the lengths of sequences (--lengths, --distribution)")
        _refuse(
            "sequences of one length (--tokens)",
            {
                "--cached": cached, "--phase": phase is not Phase.train, "--batch": batch > 1,
                "--no-causal": not causal, "--report": page,
            },
        )  # fmt: skip
        asked = Asked(
            model, cluster, lengths, distribution, sequences, context, seed, ranks, strategy or (), linear or (),
            state.value, recompute, tokens_per_rank, dtype, solver or (), effort, workers,
        )  # fmt: skip
        planned = plan_asked(asked)
        print_json(asked, planned) if as_json else print_table(planned, top)
        return
    if tokens is None:
        raise ValueError(
            "give --tokens N, or --lengths FILE or --distribution NAME for sequences that differ in length"
        )
    _refuse(
        "ragged data (--lengths, --distribution)",
        {
            "--strategy": strategy, "--linear": linear, "--solver": solver, "--recompute": recompute,
            "--tokens-per-rank": tokens_per_rank, "--context": context,
        },
    )  # fmt: skip
    config = model_config(model, None)
    place = find_cluster(cluster)
    shape = AttentionShape(
        batch, config.num_attention_heads, config.num_key_value_heads, config.head_dim, dtype
    )
    windows = {config.window(layer) for layer in config.layers}
    if config.linear is not None or len(windows) > 1:
        _refuse("models whose layers are all alike", {"--cached": cached, "--report": page})
        mixed = MixedQuestion(
            config, place, ranks or place.world_size, tokens, batch, dtype, causal, phase.value
        )
        answer_mixed(mixed, as_json)
        return
    window = windows.pop()
    question = Question(shape, place, ranks or place.world_size, tokens, cached, causal, window, phase.value)
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("simulating", total=None)
        result = plan_attention(question, lambda done, total: bar.update(task, completed=done, total=total))
    if page is not None:
        _write_page(question, result.answers[0], page)
    if as_json:
        answers = [answer.to_json() for answer in result.answers]
        typer.echo(
            json.dumps(
                {"answers": answers, "refused": dict(result.refused), "reason": result.reason}, indent=1
            )
        )
        return
    _print(question, result, top)


plan.command()(batch)


def _refuse(what: str, given: dict[str, object]) -> None:
    """ValueError for an option that goes with something else."""
    for option, value in given.items():
        if value:
            raise ValueError(f"{option} goes with {what}; leave it out")


def _write_page(question, answer, page: Path) -> None:
    """The simulated timelines of an answer, as the page that measured ones get too."""
    from counterpoint.planner.attention import predict
    from counterpoint.report.page import write_report
    from counterpoint.report.sections import Section

    timelines = {
        "forward": predict(question, answer.mesh, answer.layout, answer.forward.strategies, "forward")
    }
    if answer.backward is not None:
        names = answer.backward.strategies
        timelines["backward"] = predict(question, answer.mesh, answer.layout, names, "backward")
    about = f"{question.tokens:,} tokens on {question.ranks} ranks of {question.cluster.name}, simulated."
    write_report(
        page, timelines, title=f"Attention by {answer.forward.name}", sections=[Section("What", about)]
    )


def _print(question, result, top: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shape, console = question.shape, Console()
    if not console.is_terminal:
        console = Console(width=140)  # a file or a pipe has no width; do not cut names
    cached = f" behind {question.cached:,} cached" if question.cached else ""
    title = (
        f"{question.tokens:,} tokens{cached}, {shape.heads}/{shape.kv_heads} heads of {shape.head_dim}, {shape.dtype}, "
        f"on {question.ranks} ranks of {question.cluster.name} ({question.phase}), simulated"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    train = question.phase == "train"
    for name in ("", "mesh", "forward", *(["backward"] if train else [])):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "to best", "exposed", "sent MB", "pair MB", "peak MB"):
        table.add_column(name, justify="right", no_wrap=True)
    best = result.answers[0].seconds
    for i, a in enumerate(result.answers[:top]):
        passes = [a.forward, *([a.backward] if a.backward else [])]
        table.add_row(
            str(i + 1),
            "x".join(map(str, a.mesh)) + ("" if a.layout == "zigzag" else f" {a.layout}"),
            *(p.name for p in passes),
            f"{a.seconds * 1e3:.2f}",
            f"{a.seconds / best:.2f}x",
            f"{a.exposed_seconds * 1e3:.2f}",
            f"{sum(p.sent_bytes for p in passes) / 1e6:,.1f}",
            f"{sum(p.link_bytes for p in passes) / 1e6:,.1f}",
            f"{a.peak_bytes / 1e6:,.0f}",
        )
    console.print(table)
    console.print(
        "exposed: ms of communication with nothing to compute; sent: by the busiest rank; pair: busiest pair\n"
    )
    console.print(f"Why the first:\n{result.reason}", highlight=False, markup=False)
    for what, why in result.refused[:5]:
        console.print(f"left out: {what}: {why}", style="dim", markup=False, highlight=False)
