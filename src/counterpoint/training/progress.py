"""What a run shows on the terminal: a line per logged step, and a bar below them on a terminal."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from counterpoint.training.metrics import Metrics
from counterpoint.training.step import StepResult


class Reporter:
    """Shows progress and writes metrics on rank 0; on the other ranks (`shown` false) it does nothing.

    Use as a context. `steps` is the number of steps of the whole run, `step` those already done.
    """

    def __init__(self, metrics: Metrics | None, step: int, steps: int) -> None:
        self.metrics, self.shown, self.first, self.steps = metrics, metrics is not None, step, steps
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._began = time.monotonic()

    def __enter__(self) -> Reporter:
        if self.shown and self._console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[left]}"), console=self._console)
            self._bar.start()
            self._task = self._bar.add_task("", total=self.steps, completed=self.first, left="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self.metrics is not None:
            self.metrics.close()

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.shown:
            self._console.print(text, markup=False)
            sys.stdout.flush()

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, left=f"left {self._left(step)}")

    def log(self, step: int, result: StepResult, lr: float, tokens_per_second: float, tokens: int) -> None:
        """One logged step; `tokens` have been trained on so far."""
        if self.metrics is None:
            return
        values = {
            "loss": result.loss,
            "lr": lr,
            "gradient_norm": result.gradient_norm,
            "tokens_per_second": tokens_per_second,
            "tokens": tokens,
            "exposed": result.exposed,
        }
        self.metrics.write(step, values)
        parts = [f"step {step:>{len(str(self.steps))}}/{self.steps}", f"loss {result.loss:.4f}"]
        parts += [
            f"{tokens_per_second:,.0f} tokens/s",
            f"grad norm {result.gradient_norm:.2f}",
            f"lr {lr:.2e}",
        ]
        if result.exposed is not None:
            parts.append(f"exposed {result.exposed:.0%}")
        self.say("  ".join([*parts, f"left {self._left(step)}"]))

    def log_validation(self, step: int, loss: float) -> None:
        """The loss on held-out text after `step` steps."""
        if self.metrics is not None:
            self.metrics.write(step, {"validation_loss": loss})
            self.say(f"step {step}  validation loss {loss:.4f}")

    def _left(self, step: int) -> str:
        done = step - self.first
        seconds = (time.monotonic() - self._began) / max(1, done) * (self.steps - step)
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def warn(text: str) -> None:
    """A line on standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
