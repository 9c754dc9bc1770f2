"""A line that shows what is being measured."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


class Bar:
    """A progress bar for about `steps` steps while it is entered; `advance` names the next one."""

    def __init__(self, title: str, steps: int, console: Console | None = None) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.progress = Progress(
            TextColumn(f"{title:18}"),
            BarColumn(24),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
        )
        self.task = self.progress.add_task("", total=steps)
        self.steps, self.done, self.shown = steps, -1, False

    def __enter__(self) -> Bar:
        self.progress.start()
        self.shown = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.progress.update(self.task, completed=self.steps, description="done")
        self.progress.stop()

    def advance(self, what: str) -> None:
        """The step before is over, `what` begins."""
        if self.shown:
            self.done += 1
            self.progress.update(self.task, completed=min(self.done, self.steps), description=what)
