"""Plans of the next batches, made by other processes while training runs (FlexSP, section 5)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType

from counterpoint.planner.batch import BatchPlan, check_lengths
from counterpoint.planner.batch_cost import BatchCost
from counterpoint.planner.workers import Worker, WorkerError

Solver = Callable[[Sequence[int], BatchCost], BatchPlan]


class PlanAhead:
    """Submit lengths of coming batches, get their plans in any order.

    solver: a function of (lengths, cost) that other processes can import, e.g. `flexsp`. workers: processes. ahead:
    most batches that may be submitted and not yet fetched; `submit` raises ValueError beyond. limit_seconds: a plan
    that takes longer fails. Plans do not depend on the number of workers. Use it as a context, or call `close`; the
    processes also end when this one does.
    """

    def __init__(
        self,
        solver: Solver,
        cost: BatchCost,
        *,
        workers: int = 1,
        ahead: int = 4,
        limit_seconds: float = 120.0,
    ) -> None:
        if workers < 1 or ahead < 1:
            raise ValueError(f"workers is {workers} and ahead {ahead}; both must be at least 1")
        self.solver, self.cost, self.ahead, self.limit_seconds = solver, cost, ahead, limit_seconds
        self._waiting: list[tuple[int, tuple[int, ...]]] = []
        self._found: dict[int, BatchPlan | Exception] = {}
        self._open: set[int] = set()
        self._next, self._closed = 0, False
        self._change = threading.Condition()
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, lengths: Sequence[int]) -> int:
        """The index of the batch, to fetch its plan by. Raises ValueError for bad lengths or too many open batches."""
        check_lengths(lengths)
        with self._change:
            if self._closed:
                raise ValueError("this planner is closed")
            if len(self._open) >= self.ahead:
                raise ValueError(
                    f"{len(self._open)} batches are submitted and not fetched, ahead is {self.ahead}; fetch one first"
                )
            index, self._next = self._next, self._next + 1
            self._open.add(index)
            self._waiting.append((index, tuple(lengths)))
            self._change.notify_all()
            return index

    def ready(self, index: int) -> bool:
        """Whether `get` would return (or raise) at once."""
        with self._change:
            return index in self._found

    def get(self, index: int) -> BatchPlan:
        """The plan of a submitted batch, once; waits for it.

        Raises ValueError: no such batch, or the solver's error; WorkerError (a RuntimeError): the process failed.
        """
        with self._change:
            if index not in self._open:
                raise ValueError(f"batch {index} was not submitted, or its plan has been fetched")
            while index not in self._found:
                if self._closed:
                    raise WorkerError(f"batch {index}: the planner was closed before its plan was made")
                self._change.wait(0.5)
            found = self._found.pop(index)
            self._open.discard(index)
        if isinstance(found, Exception):
            raise type(found)(f"planning batch {index} failed: {found}")
        return found

    def close(self) -> None:
        """End the processes; plans not yet fetched are lost."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> PlanAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self) -> None:
        """One thread per process: hand out batches in order, take back plans."""
        worker = Worker()
        try:
            while True:
                with self._change:
                    while not self._waiting and not self._closed:
                        self._change.wait()
                    if self._closed:
                        return
                    index, lengths = self._waiting.pop(0)
                found = self._work(worker, lengths)
                with self._change:
                    if found is None:
                        return
                    self._found[index] = found
                    self._change.notify_all()
        finally:
            worker.end()

    def _work(self, worker: Worker, lengths: tuple[int, ...]) -> BatchPlan | Exception | None:
        """A plan, or why there is none; None when closed meanwhile."""
        try:
            worker.begin(self.solver, (lengths, self.cost), self.limit_seconds)
            while not self._closed:
                ready, plan = worker.done(0.1)
                if ready:
                    return plan
            return None
        except (ValueError, WorkerError) as error:
            return error
        except TimeoutError:
            return WorkerError(f"the solver took longer than {self.limit_seconds:g} s")
        except OSError as error:
            return WorkerError(f"the planning process could not be started: {error}")
