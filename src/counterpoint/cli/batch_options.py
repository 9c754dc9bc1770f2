"""Options with which a ragged batch is described: the same for every command that plans one."""

from __future__ import annotations

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


Lengths = Annotated[
    Path | None, typer.Option(help="A file of lengths: a JSON list, or numbers between blanks.")
]
Distribution = Annotated[
    str | None,
    typer.Option(help="Synthetic lengths: wikipedia-like, commoncrawl-like, github-like, byted-like."),
]
Sequences = Annotated[int, typer.Option(min=1, help="Sequences to draw.")]
Context = Annotated[
    int | None, typer.Option(min=1, help="Longest context: cuts drawn lengths, sizes the static plan.")
]
Seed = Annotated[int, typer.Option(help="Of the drawn lengths and the MILP.")]
Strategy = Annotated[
    list[GroupStrategy] | None,
    typer.Option(
        help="How a group shares sequences in softmax layers (repeatable); beyond the heads always ring.",
        show_default="all",
    ),
]
LinearStrategy = Annotated[
    list[str] | None,
    typer.Option("--linear", help="Strategy of linear attention layers (repeatable).", show_default="all"),
]
Sharding = Annotated[
    State,
    typer.Option("--state", help="zero3: micro-batches are synchronous; zero1: ranks go on by themselves."),
]
Recompute = Annotated[bool, typer.Option(help="Layers keep their input alone and run again.")]
TokensPerRank = Annotated[
    int | None, typer.Option(min=1, help="Most tokens a rank holds.", show_default="what its memory takes")
]
Solvers = Annotated[
    list[str] | None, typer.Option("--solver", help="Only this solver (repeatable).", show_default="all")
]
Effort = Annotated[int, typer.Option(min=0, help="Of FlexSP's MILP, per micro-batch; 0: none.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes for FlexSP's MILPs.")]
