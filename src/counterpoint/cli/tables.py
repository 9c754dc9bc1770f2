"""Tables that commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from counterpoint.training.verify import Difference, Verification


def verification_table(result: Verification, world_size: int) -> Table:
    """The loss, the worst gradients, and the verdict."""
    verdict = "equal" if result.holds else "NOT equal"
    caption = (
        f"{len(result.differences) - 1} gradients and the loss over {result.tokens:,} tokens: {verdict} "
        f"within {result.tolerance:g} relative"
    )
    if result.plan:
        caption += f"\n{result.plan}"
    table = Table(title=f"{world_size} processes against one", caption=caption, title_justify="left")
    for column in ("quantity", f"{world_size} processes", "1 process", "relative difference"):
        table.add_column(column, justify="left" if column == "quantity" else "right")
    for d in shown(result):
        table.add_row(d.name, f"{d.sharded:.7f}", f"{d.single:.7f}", f"{d.relative:.1e}")
    return table


def shown(result: Verification) -> list[Difference]:
    """The loss and the gradients that differ most."""
    loss, *gradients = result.differences
    return [loss, *sorted(gradients, key=lambda d: -d.relative)[:5]]
