"""Does the simulator, given a calibrated cluster, predict what this machine does? At sizes that were not calibrated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor

from counterpoint.calibration.calibrate import run_workers
from counterpoint.calibration.compute import HEAD_DIM, HEADS
from counterpoint.calibration.links import ROUNDS, there_and_back
from counterpoint.calibration.measurement import Point, Series, series_from
from counterpoint.calibration.timing import Effort, Stopwatch, sample
from counterpoint.cluster.cluster import Cluster
from counterpoint.cluster.units import format_quantity
from counterpoint.kernels.attention import Attend, AttendBackward, Merge
from counterpoint.kernels.kernel import Kernel, TensorSpec
from counterpoint.kernels.mask import Area
from counterpoint.runtime.executor import Executor
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.schedule import Schedule

MARGIN = 1.5  # a prediction may lie this factor outside the range of the fresh runs
MESSAGE = 3 * 2**20
TOKENS = 600
CAUSAL_TOKENS = 1800  # causal kernels of the CPU compute whole tiles, which tells in short blocks
MATMUL = (384, 640, 512)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was predicted, in seconds, beside the times that a fresh measurement took."""

    name: str
    predicted: float
    measured: Point

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured.quiet

    @property
    def holds(self) -> bool:
        """Whether the prediction lies within the range of the runs, with a margin."""
        return self.measured.best / MARGIN <= self.predicted <= self.measured.seconds[-1] * MARGIN


def compare(cluster: Cluster, effort: Effort, environ: Mapping[str, str]) -> list[Comparison]:
    """Predict and measure the same kernels and messages on the ranks of this machine's cluster.

    Raises:
        WorkerFailure: a worker ended badly.
    """
    found = run_workers(cluster.world_size, {"effort": asdict(effort), "check": True}, environ)
    measured = {name: s.points[0] for name, s in series_from(found["series"]).items()}
    expected = predict(cluster)
    return [Comparison(name, seconds, measured[name]) for name, seconds in expected.items()]


def predict(cluster: Cluster) -> dict[str, float]:
    """Seconds of every case by simulation."""
    from counterpoint.simulator.simulate import simulate  # starts a compiler

    n = cluster.world_size
    m, k, p = MATMUL
    device = cluster.device(0)
    nbytes = 4 * (m * k + k * p + m * p)
    found = {"matmul": device.seconds("matmul", 2 * m * k * p, nbytes, "float32")}
    for name, kernel in kernels().items():
        schedules = [_one_step(kernel, specs(kernel), rank, n) for rank in range(n)]
        timeline = simulate(schedules, cluster)
        found[name] = timeline.stop - timeline.start
    for name, schedules in messages(n).items():
        timeline = simulate(schedules, cluster)
        found[name] = timeline.stop - timeline.start
    return found


def measure_cases(
    executor: Executor, together: Callable[[], None], effort: Effort, own: bool
) -> dict[str, Series]:
    """Times of every case on this rank; collective over the ranks of the executor's transport."""
    stopwatch = Stopwatch(own=own)
    transport = executor.transport
    n = len(transport.ranks) if transport else 1
    rank = transport.rank if transport else 0
    m, k, p = MATMUL
    a, b, c = torch.randn(m, k), torch.randn(k, p), torch.empty(m, p)
    runs: dict[str, Callable[[], object]] = {"matmul": lambda: torch.mm(a, b, out=c)}
    for name, kernel in kernels().items():
        inputs = _inputs(kernel)
        runs[name] = lambda kernel=kernel, inputs=inputs: kernel.run(*inputs)
    found = {}
    for name, run in runs.items():
        together()
        found[name] = Series("seconds", (sample(run, 1, name, effort, stopwatch),))
    for name, schedules in messages(n).items():
        schedule = schedules[rank]
        inputs = {v.name: torch.zeros(v.spec.shape) for v in schedule.inputs}
        times = torch.zeros(2 + 4 * effort.sizes, dtype=torch.float64)
        executor.run(schedule, inputs)
        for i in range(len(times)):
            together()
            times[i] = Stopwatch()(lambda s=schedule, i=inputs: executor.run(s, i))[0]
        dist.all_reduce(times, dist.ReduceOp.MAX)  # it is over when the last rank is done
        found[name] = Series("seconds", (Point.of(1, name, times.tolist()),))
    return found


# ---- the cases -------------------------------------------------------------------------------------
def kernels() -> dict[str, Kernel]:
    """Kernels of attention, as strategies use them."""
    scale = HEAD_DIM**-0.5
    full = (Area(0, TOKENS, 0, TOKENS),)
    return {
        "attend, causal": Attend((Area(0, CAUSAL_TOKENS, 0, CAUSAL_TOKENS, None, 0),), scale),
        "attend, full": Attend(full, scale),
        "attend backward, full": AttendBackward(full, scale, (), True),
        "merge": Merge(((0, TOKENS),)),
    }


def specs(kernel: Kernel) -> tuple[TensorSpec, ...]:
    """The inputs of a case."""
    tokens = kernel.areas[0].rows if isinstance(kernel, Attend) else TOKENS
    x, row = TensorSpec((1, tokens, HEADS, HEAD_DIM)), TensorSpec((1, tokens, HEADS))
    if isinstance(kernel, Merge):
        return x, row, x, row
    return (x, x, row, x, x, x) if isinstance(kernel, AttendBackward) else (x, x, x)


def messages(n: int) -> dict[str, list[Schedule]]:
    """Schedules that move messages only, for all ranks; none for a single rank."""
    if n < 2:
        return {}
    size = TensorSpec((MESSAGE // 4,))
    return {
        f"message of 3 MiB, there and back {ROUNDS} times": [
            there_and_back(size, ROUNDS, r, n) for r in range(n)
        ],
        f"3 MiB to the next rank, {ROUNDS} times": [_ring(size, r, n) for r in range(n)],
        "all-gather of 3 MiB": [_gather(size, r, n) for r in range(n)],
    }


def _one_step(kernel: Kernel, inputs: tuple[TensorSpec, ...], rank: int, n: int) -> Schedule:
    b = Builder("check", rank, n)
    outputs = b.compute(kernel, *(b.input(f"x{i}", spec) for i, spec in enumerate(inputs)))
    return b.finish({f"y{i}": y for i, y in enumerate(outputs)})


def _ring(spec: TensorSpec, rank: int, n: int) -> Schedule:
    b = Builder("check", rank, n)
    value = b.input("x", spec)
    for _ in range(ROUNDS):
        b.send([value], (rank + 1) % n, "ring")
        (value,) = b.recv([spec], (rank - 1) % n, "ring")
    return b.finish({"x": value})


def _gather(spec: TensorSpec, rank: int, n: int) -> Schedule:
    b = Builder("check", rank, n)
    value = b.input("x", spec)
    others = [r for r in range(n) if r != rank]
    parts = b.collective(
        "all_gather", "gather", {r: [value] for r in others}, {r: [(f"part{r}", spec)] for r in others}
    )
    return b.finish({f"x{r}": part for r, (part,) in parts.items()})


def _inputs(kernel: Kernel) -> list[Tensor]:
    """Random values; a logsumexp and an output that belong to them where the backward pass wants those."""
    values = [torch.randn(spec.shape) for spec in specs(kernel)]
    if isinstance(kernel, AttendBackward):
        q, _, _, _, k, v = values
        values[3], values[2] = Attend(kernel.areas, kernel.scale).run(q, k, v)
    return values


def comparison_table(rows: list[Comparison]) -> Table:
    """Predicted beside measured."""
    table = Table(title="Simulated on the calibrated cluster, and measured again", title_justify="left")
    for i, column in enumerate(("case", "predicted", "measured", "ratio", "range of the runs", "within")):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        times = [row.predicted, row.measured.quiet, row.measured.best, row.measured.seconds[-1]]
        predicted, quiet, best, worst = (format_quantity(t, "seconds") for t in times)
        table.add_row(
            row.name,
            predicted,
            quiet,
            f"{row.ratio:.2f}",
            f"{best} - {worst}",
            "yes" if row.holds else "NO",
        )
    return table
