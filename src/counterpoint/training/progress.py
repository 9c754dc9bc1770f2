"""What a run shows on the terminal: a line per logged step, and a bar below them on a terminal."""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from counterpoint.training.metrics import Metrics
from counterpoint.training.step import PlanResult, StepResult


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
        if result.plan is not None:
            values |= plan_values(result.plan)
        self.metrics.write(step, values)
        parts = [f"step {step:>{len(str(self.steps))}}/{self.steps}", f"loss {result.loss:.4f}"]
        parts += [
            f"{tokens_per_second:,.0f} tokens/s",
            f"grad norm {result.gradient_norm:.2f}",
            f"lr {lr:.2e}",
        ]
        if result.exposed is not None:
            parts.append(f"exposed {result.exposed:.0%}")
        if result.plan is not None:
            parts.append(plan_text(result.plan))
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


def plan_values(result: PlanResult) -> dict[str, Any]:
    """What is written down of a plan: its sizes, its time as planned and as measured."""
    plan = result.plan
    return {
        "sequences": len(plan.lengths),
        "micro_batches": len(plan.micro_batches),
        "groups": [[len(group.ranks) for group in row.groups] for row in plan.micro_batches],
        "planned_seconds": plan.seconds,
        "measured_seconds": result.seconds,
        "plan_wait_seconds": result.waited,
    }


def plan_text(result: PlanResult) -> str:
    """Micro-batches with the sizes of their groups, equal ones once, and the planned time beside the measured one."""
    plan = result.plan
    rows = Counter(
        " + ".join(
            f"{n}x{size}"
            for size, n in sorted(Counter(len(g.ranks) for g in row.groups).items(), reverse=True)
        )
        for row in plan.micro_batches
    )
    groups = ", ".join(f"{n} of {row}" if n > 1 else row for row, n in rows.items())
    planned = f"planned {plan.seconds:.3g} s, " if plan.seconds else ""
    return f"{len(plan.lengths)} sequences in groups {groups} ({planned}took {result.seconds:.3g} s)"


def warn(text: str) -> None:
    """A line on standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
