"""The table of `counterpoint plan attention` for models whose layers are not alike."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from counterpoint.planner.attention import Answer
    from counterpoint.planner.mixed import MixedPlan, MixedQuestion


def answer_mixed(question: MixedQuestion, as_json: bool) -> None:
    """Simulate and print."""
    from rich.console import Console

    from counterpoint.planner.mixed import plan_mixed

    with Console(stderr=True).status("simulating") as status:
        plan = plan_mixed(question, lambda what: status.update(f"simulating {what}"))
    if as_json:
        tried = {
            f"{kind.name}{f' of {kind.window}' if kind.window else ''}": [a.to_json() for a in answers]
            for kind, answers in plan.tried
        }
        typer.echo(json.dumps({"answers": [a.to_json() for a in plan.answers], "tried": tried}, indent=1))
        return
    _print(question, plan)


def _name(answer: Answer) -> str:
    names = [p.name for p in (answer.forward, answer.backward) if p is not None]
    return " + ".join(dict.fromkeys(names))


def _print(question: MixedQuestion, plan: MixedPlan) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console() if Console().is_terminal else Console(width=180)
    train = question.phase == "train"
    table = Table(
        title=f"{question.tokens:,} tokens through {question.model.num_hidden_layers} layers on {question.ranks} ranks "
        f"of {question.cluster.name} ({question.phase}), simulated",
        title_justify="left", box=SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    for name in ("", "layers", "layout", "mesh", "forward", *(["backward"] if train else [])):
        table.add_column(name, no_wrap=True)
    for name in ("ms a layer", "ms", "exposed ms", "sent MB"):
        table.add_column(name, justify="right", no_wrap=True)
    blank = [""] * (2 if train else 1)
    for i, answer in enumerate(plan.answers, 1):
        for line in answer.lines:
            a = line.answer
            passes = [a.forward, *([a.backward] if a.backward else [])]
            what = line.type.name + (f" {line.type.window}" if line.type.window else "")
            table.add_row(
                what, str(len(line.type.layers)), a.layout, "x".join(map(str, a.mesh)), *(p.name for p in passes),
                f"{a.seconds * 1e3:.3f}", f"{line.seconds * 1e3:.2f}", f"{a.exposed_seconds * 1e3:.3f}",
                f"{sum(p.sent_bytes for p in passes) / 1e6:,.1f}",
            )  # fmt: skip
        table.add_row(
            "changes of layout",
            str(answer.moves),
            "",
            "",
            *blank,
            "",
            f"{answer.move_seconds * 1e3:.2f}",
            "",
            "",
        )
        table.add_row(
            f"{i}. softmax layers {answer.layout}", str(question.model.num_hidden_layers), "", "", *blank, "",
            f"{answer.seconds * 1e3:.2f}", "", "", end_section=True, style="bold",
        )  # fmt: skip
    console.print(table)
    console.print("Attention and changes of layout only, all layers; exposed and sent: per layer.")
    for kind, answers in plan.tried:
        best = answers[0].seconds
        others = "; ".join(
            f"{_name(a)} {a.layout} {a.seconds * 1e3:.3f} ms ({a.seconds / best:.2f}x)" for a in answers[:4]
        )
        console.print(f"{kind.name}: {others}", highlight=False, markup=False)
