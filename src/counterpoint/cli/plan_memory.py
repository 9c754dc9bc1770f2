"""`counterpoint plan memory`: what a training step takes, and which memory policy makes it fit."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Objective(StrEnum):
    sft = "sft"
    dpo = "dpo"
    grpo = "grpo"


class States(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


def memory(
    model: Annotated[str, typer.Option(help="qwen3-8b, llama-3-70b, ..., a config.json or its directory.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")],
    cluster: Annotated[
        str,
        typer.Option("--cluster", "--device", help="A preset (counterpoint cluster list) or a YAML file."),
    ] = "dgx-a100",
    ranks: Annotated[int, typer.Option(min=1, help="Ranks, each with sequences of its own.")] = 1,
    zero: Annotated[int, typer.Option(help="Stage of sharding states over the ranks, 0 to 3.")] = 0,
    train: Annotated[str, typer.Option(help="full, lora, or lora(RANK).")] = "full",
    objective: Annotated[
        Objective, typer.Option(help="dpo: pairs and a reference; grpo: groups and a reference.")
    ] = Objective.sft,
    group: Annotated[int, typer.Option(min=1, help="Sequences of a group (grpo).")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Sequences (pairs, groups) of a rank.")] = 1,
    budget: Annotated[str | None, typer.Option(help="Memory of a rank, as 24GB; all the device has.")] = None,
    dtype: Annotated[str, typer.Option(help="Of parameters and activations.")] = "bfloat16",
    states: Annotated[States, typer.Option(help="Of AdamW's two moments.")] = States.float32,
    master: Annotated[bool, typer.Option(help="A float32 copy of 2-byte parameters.")] = False,
    head_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens whose logits exist at a time; 0 for all.")
    ] = 1024,
    chunk: Annotated[
        int, typer.Option(min=1, help="Tokens that streamed layers work on at a time, in at most 64 chunks.")
    ] = 2048,
    top: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 12,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw the memory over a step, keep against recompute and stream (.png)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Say how long a sequence fits under each memory policy, and which policy is fastest for this one.

    Peaks are counted from the tensors that operators keep, times simulated on the described device.

    counterpoint plan memory --model qwen3-8b --tokens 32000 --device dgx-a100 --states bfloat16
    """
    from rich.console import Console

    from counterpoint.cluster.presets import find_cluster
    from counterpoint.cluster.units import parse_quantity
    from counterpoint.model.shapes import find_shape
    from counterpoint.planner.memory import Question, plan_memory
    from counterpoint.strategies.memory.sharding import Training

    config = find_shape(model)
    if tokens > config.max_position_embeddings:
        typer.echo(
            f"note: {model} was made for {config.max_position_embeddings:,} positions, {tokens:,} were asked for",
            err=True,
        )
    training = Training(lora_rank(train), states.value, master, zero, ranks)
    question = Question(
        config, find_cluster(cluster), tokens, batch, dtype, "fused", training, objective.value, group,
        None if budget is None else int(parse_quantity(budget, "bytes")), chunk, head_tokens or None,
    )  # fmt: skip
    errors = Console(stderr=True)
    with errors.status("") as status:
        plan = plan_memory(question, status.update)
    if picture is not None:
        from counterpoint.report.memory import draw_memory

        with errors.status("simulating the steps of the picture"):
            draw_memory(question, picture)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "answers": [answer.to_json() for answer in plan.answers], "longest_tokens": plan.longest,
                    "budget_bytes": question.limit, "refused": dict(plan.refused), "reason": plan.reason,
                },
                indent=1,
            )
        )  # fmt: skip
        return
    _print(question, plan, model, train, top)


def lora_rank(train: str) -> int | None:
    """The rank of adapters; None for full training. Raises ValueError for anything else."""
    if train == "full":
        return None
    if train == "lora":
        return 32
    inside = train.removeprefix("lora(").removesuffix(")")
    if train == f"lora({inside})" and inside.isdigit() and int(inside) > 0:
        return int(inside)
    raise ValueError(f"--train {train}: allowed are full, lora (rank 32) and lora(RANK), as lora(16)")


def _print(question, plan, model: str, train: str, top: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    t = question.training
    where = f"{question.cluster.device(0).name}" + (
        f", {t.ranks} ranks, ZeRO-{t.zero}" if t.ranks > 1 else ""
    )
    title = (
        f"{model}, {train}, {question.objective}, {question.tokens:,} tokens, {question.dtype}, on {where}: "
        f"{question.limit / 1e9:,.1f} GB a rank, simulated"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for name in ("s/step", "GB", "params", "adam", "grads", "kept", "working", "host"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("at its peak", no_wrap=True)
    for a in plan.answers[:top]:
        p = a.peak
        parts = (p.total, p.parameters, p.optimizer, p.gradients, p.checkpoints, p.working + p.shared, p.host)
        table.add_row(
            a.name,
            f"{a.seconds:.3f}" if a.fits else "too large",
            *(f"{n / 1e9:,.2f}" for n in parts),
            p.where,
            style="" if a.fits else "dim",
        )
    console.print(table)
    console.print("GB at the peak; kept: by layers that do not run then; working: by the part that runs\n")
    longest = ", ".join(f"{name} {n:,}" for name, n in plan.longest.items())
    console.print(f"Longest sequence: {longest}", highlight=False, markup=False)
    console.print(f"Why the first:\n{plan.reason}", highlight=False, markup=False)
    for what, why in plan.refused:
        console.print(f"left out: {what}: {why}", style="dim", markup=False, highlight=False)
