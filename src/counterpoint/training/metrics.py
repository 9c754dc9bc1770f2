"""What a run writes down: metrics.jsonl, one line per logged step, and the same for TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any, Literal


class Metrics:
    """Writer of a run's metrics; values of steps after `step`, from a run that was cut short, are dropped.

    Raises ValueError when TensorBoard is asked for and not installed; "auto" uses it when it is.
    """

    def __init__(self, directory: Path, step: int, tensorboard: bool | Literal["auto"] = False) -> None:
        self.path = directory / "metrics.jsonl"
        lines = [line for line in read_metrics(self.path) if line["step"] <= step]
        _replace(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = self.path.open("a")
        self._board = _board(directory / "tensorboard", step, tensorboard)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Adds a line for `step`, on the disk before this returns."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last one that was cut; [] when there is no file."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _board(directory: Path, step: int, wanted: bool | Literal["auto"]) -> Any:
    installed = importlib.util.find_spec("tensorboard") is not None
    if wanted is True and not installed:
        raise ValueError(
            "metrics.tensorboard = true, but TensorBoard is not installed; "
            "pip install 'counterpoint[tensorboard]' or set it to false"
        )
    if not wanted or not installed:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory), purge_step=step + 1)
