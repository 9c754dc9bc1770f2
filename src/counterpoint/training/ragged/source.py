"""Ragged batches with their plans, the same on all ranks: rank 0 draws and plans ahead, and tells the others."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from counterpoint.planner.batch import BatchPlan
from counterpoint.training.mesh import Processes
from counterpoint.training.ragged.step import RaggedBatch
from counterpoint.training.ragged.stream import Place, RaggedStream


class Planner(Protocol):
    """What plans batches, such as planner.ahead.PlanAhead."""

    def submit(self, lengths: Sequence[int]) -> int:
        """Begin to plan a batch of sequences of these lengths (tokens); the number to fetch its plan by."""
        ...

    def get(self, index: int) -> BatchPlan:
        """The plan of a batch; waits until it is there."""
        ...


class RaggedBatches:
    """Iterator over `RaggedBatch`. ahead: how many batches beyond the next one are being planned.

    One rank plans, because plans may depend on how long a solver had. planner: on rank 0, None on the others.
    """

    def __init__(
        self, stream: RaggedStream, planner: Planner | None, processes: Processes, ahead: int
    ) -> None:
        self.stream, self.planner, self.processes, self.ahead = stream, planner, processes, ahead
        # sequences, the number of their plan, the stream's state behind them
        self._drawn: deque[tuple[tuple[Place, ...], int, dict[str, Any]]] = deque()
        self._state = stream.state_dict()

    def __next__(self) -> RaggedBatch:
        batch, self._state = self.processes.first(self._next)
        return batch

    def _next(self) -> tuple[RaggedBatch, dict[str, Any]]:
        assert self.planner is not None
        while len(self._drawn) <= self.ahead:
            places = self.stream.draw()
            index = self.planner.submit([place.length for place in places])
            self._drawn.append((places, index, self.stream.state_dict()))
        began = time.perf_counter()
        places, index, state = self._drawn.popleft()
        plan = self.planner.get(index)
        assert plan.lengths == tuple(place.length for place in places)
        return RaggedBatch(places, plan, time.perf_counter() - began), state

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values with which another one goes on behind the last batch, on any number of processes."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; before the first batch. Raises ValueError when it is of another stream."""
        assert not self._drawn
        self.stream.load_state_dict(state)
        self._state = self.stream.state_dict()
