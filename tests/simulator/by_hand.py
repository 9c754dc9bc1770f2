"""Small clusters whose figures are round, and schedules written by hand."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from counterpoint.cluster.cluster import Cluster
from counterpoint.cluster.load import load_cluster
from counterpoint.kernels.kernel import Kernel, TensorSpec, Work
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.schedule import Schedule
from counterpoint.schedule.timeline import Span, Timeline

MS = 1e-3
LEVEL = {"level": "node", "count": 4, "bandwidth": "1 GB/s", "latency": "1 ms"}


@dataclass(frozen=True, slots=True)
class Busy(Kernel):
    """A kernel that takes so many milliseconds (at 1 TFLOP/s) and makes one new tensor."""

    milliseconds: float
    made: TensorSpec

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        return (self.made,)

    def work(self, *inputs: TensorSpec) -> Work:
        return Work(round(self.milliseconds * 1e9))

    def label(self) -> str:
        return "busy"


def megabytes(n: float) -> TensorSpec:
    return TensorSpec((round(n * 250_000),))


def schedules(*writers: Callable[[Builder], dict]) -> list[Schedule]:
    """One schedule per function, which writes the steps of a rank and returns its outputs."""
    builders = [Builder("by hand", rank, len(writers)) for rank in range(len(writers))]
    return [b.finish(write(b)) for b, write in zip(builders, writers, strict=True)]


def sender(to: int, *sizes: float, channel: str = "x") -> Callable[[Builder], dict]:
    """Sends tensors of so many megabytes, one message each."""

    def write(b: Builder) -> dict:
        for i, size in enumerate(sizes):
            b.send([b.input(f"a{i}", megabytes(size))], to, channel)
        return {}

    return write


def receiver(*messages: tuple[int, float], channel: str = "x", depth: int = 8) -> Callable[[Builder], dict]:
    """Receives tensors of so many megabytes from ranks, on a channel per rank, and returns them."""

    def write(b: Builder) -> dict:
        b.depth(channel, depth)
        return {f"b{i}": b.recv([megabytes(n)], r, channel)[0] for i, (r, n) in enumerate(messages)}

    return write


def fan_out(size: float, *ranks: int) -> Callable[[Builder], dict]:
    """Sends a tensor of so many megabytes to each of the ranks at once, to rank r on channel x<r>."""

    def write(b: Builder) -> dict:
        for r in ranks:
            b.send([b.input(f"a{r}", megabytes(size))], r, f"x{r}")
        return {}

    return write


def idle(b: Builder) -> dict:
    return {}


def cluster(
    link: str = "switch", memory: str = "1 GB", levels: list[dict] | None = None, **level: object
) -> Cluster:
    """Four devices of 1 TFLOP/s, joined at 1 GB/s with 1 ms latency; or on other levels."""
    one = {key: value for key, value in {**LEVEL, "link": link, **level}.items() if value is not None}
    text = yaml.safe_dump(
        {
            "name": "by-hand",
            "devices": {
                "d": {
                    "memory": {
                        "fast": {"size": memory, "bandwidth": "1000 TB/s"},
                        "host": {"size": "100 GB", "bandwidth": "2 GB/s"},
                    },
                    "peak": {"float32": "1 TFLOP/s"},
                    "rates": {"elementwise": {"float32": "1 TFLOP/s"}, "matmul": {"bfloat16": "1 TFLOP/s"}},
                    "launch": "0 s",
                }
            },
            "levels": levels or [one],
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cluster.yaml"
        path.write_text(text)
        return load_cluster(path)


def spans(timeline: Timeline, rank: int, kind: str) -> list[Span]:
    return [s for s in timeline.spans if s.rank == rank and s.kind == kind]
