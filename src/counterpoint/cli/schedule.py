"""`counterpoint schedule`: print what a strategy does, step by step."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer


class Pass(StrEnum):
    forward = "forward"
    backward = "backward"


def schedule(
    strategy: Annotated[str, typer.Argument(help='e.g. tokenring, "tokenring(packets=2)", ring/ulysses')],
    mesh: Annotated[str, typer.Option(help="Ranks, or sizes of the axes, outermost first: 4 or 2x4.")] = "4",
    rank: Annotated[int | None, typer.Option(min=0, help="Only this rank.", show_default="all")] = None,
    tokens: Annotated[int, typer.Option(min=1)] = 4096,
    heads: Annotated[int, typer.Option(min=1)] = 8,
    kv_heads: Annotated[int | None, typer.Option(min=1, show_default="as heads")] = None,
    head_dim: Annotated[int, typer.Option(min=1)] = 64,
    dtype: Annotated[str, typer.Option()] = "float32",
    layout: Annotated[str, typer.Option(help="contiguous, zigzag, striped or document-zigzag")] = "zigzag",
    causal: Annotated[bool, typer.Option()] = True,
    window: Annotated[int | None, typer.Option(min=1, help="Sliding window in tokens.")] = None,
    documents: Annotated[str, typer.Option(help="Lengths of packed documents: 1000,3096")] = "",
    which: Annotated[Pass, typer.Option("--pass", help="forward or backward")] = Pass.forward,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Print the schedule of an attention strategy: every step of every rank, with its bytes.

    The schedules are checked first: messages match, nothing deadlocks, every value is freed.

        counterpoint schedule tokenring --mesh 4 --rank 1
    """
    from counterpoint.schedule.check import check
    from counterpoint.schedule.store import to_json
    from counterpoint.strategies.sequence.attention import (
        AttentionProblem,
        backward_schedule,
        forward_schedule,
        parse_choices,
    )
    from counterpoint.strategies.sequence.blocks import AttentionShape
    from counterpoint.strategies.sequence.layout import SequenceLayout

    axes = _numbers(mesh, "x", "--mesh", "4 or 2x4")
    world_size = 1
    for n in axes:
        world_size *= n
    if rank is not None and rank >= world_size:
        raise ValueError(f"--rank is {rank}; a mesh of {mesh} has ranks 0 to {world_size - 1}")
    lengths = _numbers(documents, ",", "--documents", "1000,3096") if documents else ()
    choices = parse_choices(strategy)
    problem = AttentionProblem(
        AttentionShape(1, heads, kv_heads or heads, head_dim, dtype),
        SequenceLayout(layout, tokens, world_size, lengths),
        axes,
        choices,
        choices,
        causal,
        window,
    )
    write = forward_schedule if which is Pass.forward else backward_schedule
    schedules = [write(problem, r) for r in range(world_size)]
    check(schedules)
    chosen = schedules if rank is None else [schedules[rank]]
    if as_json:
        typer.echo(json.dumps([to_json(s) for s in chosen], indent=1))
    else:
        typer.echo("\n".join(str(s) for s in chosen), nl=False)


def _numbers(text: str, separator: str, option: str, example: str) -> tuple[int, ...]:
    parts = text.split(separator)
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} is {text!r}; give whole numbers of at least 1, like {example}")
    return tuple(int(part) for part in parts)
