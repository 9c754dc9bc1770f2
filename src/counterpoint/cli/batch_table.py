"""The one table of a ragged batch: a row for every batch plan with a strategy for every type of layers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from counterpoint.planner.batch_cost import BatchCost
    from counterpoint.planner.plan_batch import BatchAnswer

GROUPS = 5  # sizes of groups that a row shows


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be planned, as the options say it; see cli/batch_options.py."""

    model: str
    cluster: str
    lengths: Path | None
    distribution: str | None
    sequences: int = 512
    context: int | None = None
    seed: int = 0
    ranks: int | None = None
    strategies: Sequence[str] = ()
    linear: Sequence[str] = ()
    state: str = "zero3"
    recompute: bool = False
    tokens_per_rank: int | None = None
    dtype: str = "bfloat16"
    solvers: Sequence[str] = ()
    effort: int = 100
    workers: int = 2


@dataclass(frozen=True, slots=True)
class Planned:
    """The answers, the fastest first, to a batch of these lengths. cost: that of the first strategies."""

    lengths: list[int]
    cost: BatchCost
    answers: list[BatchAnswer]


def plan_asked(asked: Asked) -> Planned:
    """Plan with every solver and every strategy, with progress on standard error."""
    from rich.console import Console

    from counterpoint.cluster.presets import find_cluster
    from counterpoint.planner.batch_cost import BatchCost
    from counterpoint.planner.batch_solvers.flexsp import FlexspOptions
    from counterpoint.planner.lengths import find_distribution, read_lengths
    from counterpoint.planner.mixed import LINEAR_VARIANTS
    from counterpoint.planner.plan_batch import batch_costs, plan_batch, solvers
    from counterpoint.training.model import model_config

    if (asked.lengths is None) == (asked.distribution is None):
        raise ValueError("give either --lengths FILE or --distribution NAME")
    config, place = model_config(asked.model, None), find_cluster(asked.cluster)
    first = BatchCost(
        config, place, asked.ranks or place.world_size, state=asked.state, recompute=asked.recompute,  # type: ignore[arg-type]
        dtype=asked.dtype, tokens_per_rank=asked.tokens_per_rank,
    )  # fmt: skip
    costs = batch_costs(first, asked.strategies or ("ulysses", "ring"), asked.linear or LINEAR_VARIANTS)  # type: ignore[arg-type]
    if asked.lengths is not None:
        drawn = read_lengths(asked.lengths)
    else:
        assert asked.distribution is not None
        drawn = find_distribution(asked.distribution).draw(
            asked.sequences, asked.context or 32768, asked.seed
        )
    options = FlexspOptions(effort=asked.effort, seed=asked.seed)
    known = solvers(first, context=asked.context, options=options, workers=asked.workers)
    unknown = [name for name in asked.solvers if name not in known]
    if unknown:
        raise ValueError(f"no solver '{unknown[0]}'; there are {', '.join(known)}")
    chosen = {name: known[name] for name in known if not asked.solvers or name in asked.solvers}
    with Console(stderr=True).status("fitting costs to simulated schedules") as status:
        answers = plan_batch(drawn, costs, chosen, lambda name: status.update(f"planning: {name}"))
    return Planned(drawn, costs[0][0], answers)


def print_json(asked: Asked, planned: Planned, **more: object) -> None:
    from counterpoint.planner.plan_batch import reason

    cost = planned.cost
    found = {
        "model": asked.model, "cluster": cost.cluster.name, "ranks": cost.ranks, "lengths": planned.lengths,
        "state": asked.state, "recompute": asked.recompute, "tokens_per_rank": cost.capacity,
        "reason": reason(planned.answers), "answers": [a.to_json() for a in planned.answers], **more,
    }  # fmt: skip
    typer.echo(json.dumps(found, indent=1))


def print_table(planned: Planned, top: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from counterpoint.planner.plan_batch import reason

    answers, cost = planned.answers, planned.cost
    lengths, best = planned.lengths, answers[0]
    assert best.prediction is not None
    kinds = list(best.strategies)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150 + 50 * len(kinds))  # a file or a pipe has no width; do not cut names
    title = (
        f"{len(lengths):,} sequences of {min(lengths):,} to {max(lengths):,} tokens, {sum(lengths):,} in all, on "
        f"{cost.ranks} ranks of {cost.cluster.name} that hold {cost.capacity:,} tokens each ({cost.state})"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("solver", no_wrap=True)
    layers = {s.name: s.times for s in best.prediction.shares}
    for kind in kinds:
        table.add_column(f"{layers[kind]} {kind}", no_wrap=True)
    for name in (
        "seconds",
        "to best",
        *kinds,
        "else",
        "idle",
        "exposed",
        "sent GB",
        "GB",
        "micro-b.",
        "planned in s",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("groups (ranks x number)", no_wrap=True)
    planned_ones = [a for a in answers if a.plan is not None]
    for answer in planned_ones[:top]:
        table.add_row(*_row(answer, kinds, best.prediction.seconds))
    console.print(table)
    if len(planned_ones) > top:
        console.print(
            f"{len(planned_ones) - top} more with --top {len(planned_ones)}", style="dim", highlight=False
        )
    console.print(
        "seconds: a batch forward and backward; it is the time of each type of layers, of all else (embedding, head, "
        "changes of layout, state), and idle\ntime, mean over ranks. exposed: communication in it with nothing to "
        "compute; sent: by a rank for its layers, mean; GB: on the fullest rank.\nMore ranks than "
        f"{cost.model.num_attention_heads}, the heads, share a sequence as a ring.\n",
        highlight=False, markup=False,
    )  # fmt: skip
    console.print(f"Why the first:\n{reason(answers)}", highlight=False, markup=False)
    left_out = dict.fromkeys(f"{a.solver}: {a.error}" for a in answers if a.plan is None)
    for line in left_out:
        console.print(f"left out: {line}", style="dim", markup=False, highlight=False)


def _row(answer: BatchAnswer, kinds: Sequence[str], best: float) -> list[str]:
    from counterpoint.planner.plan_batch import sizes

    p = answer.prediction
    assert p is not None and answer.plan is not None
    taken = {s.name: s.compute + s.communication for s in p.shares}
    rest = sum(seconds for name, seconds in taken.items() if name not in kinds)
    groups = [f"{size}x{count}" for size, count in sizes(answer.plan).items()]
    more = f" and {len(groups) - GROUPS} sizes" if len(groups) > GROUPS else ""
    digits = 3 if best >= 0.1 else 4 if best >= 0.01 else 6

    def shown(seconds: float) -> str:
        return f"{seconds:.{digits}f}"

    return [
        answer.solver, *(answer.strategies[kind] for kind in kinds), shown(p.seconds), f"{p.seconds / best:.2f}x",
        *(shown(taken[kind]) for kind in kinds), shown(rest), shown(p.idle), shown(p.communication),
        f"{p.sent_bytes / 1e9:.3f}", f"{p.memory_bytes / 1e9:.1f}", str(len(answer.plan.micro_batches)),
        f"{answer.plan_seconds:.2f}", " ".join(groups[:GROUPS]) + more,
    ]  # fmt: skip
