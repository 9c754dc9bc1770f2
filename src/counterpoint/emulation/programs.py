"""Programs that ranks of a scale model run one after the other: held schedules, in a given order."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from counterpoint.schedule.schedule import Schedule
from counterpoint.schedule.timeline import Timeline

if TYPE_CHECKING:
    from counterpoint.runtime.executor import Executor


@dataclass(frozen=True, slots=True)
class Programs:
    """What the ranks run, and the files that they leave in `directory`.

    schedules: of every rank, by program, with held kernels. order: programs to run; every one is measured.
    """

    schedules: dict[str, list[Schedule]]
    order: tuple[str, ...]
    directory: str

    def timeline_file(self, number: int, rank: int) -> Path:
        return Path(self.directory, f"program-{number}-{rank}.json")

    def seconds_file(self, rank: int) -> Path:
        return Path(self.directory, f"program-seconds-{rank}.json")

    def carry_out(self, rank: int, executor: Executor, start_together: Callable[[], None]) -> None:
        """Run a rank's part of all programs."""
        seconds = []
        for number, name in enumerate(self.order):
            timeline, schedule = Timeline("measured"), self.schedules[name][rank]
            start_together()
            began = time.perf_counter()
            executor.run(schedule, {}, timeline)
            seconds.append(time.perf_counter() - began)
            timeline.write(self.timeline_file(number, rank))
        self.seconds_file(rank).write_text(json.dumps(seconds))
