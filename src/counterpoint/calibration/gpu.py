"""The GPUs of this machine, measured from one process: kernels, memory, copies to the host and to each other."""

from __future__ import annotations

import torch

from counterpoint.calibration.compute import measure_device
from counterpoint.calibration.measurement import Series
from counterpoint.calibration.progress import Bar
from counterpoint.calibration.timing import Effort, Stopwatch, sample, spaced

PASS_BYTES = 3 * 2**31  # no cache of a GPU holds it
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def measure_gpus(effort: Effort) -> dict[str, Series]:
    """Series of GPU 0, of copies between it and the host, and of copies between GPUs 0 and 1 where there are two."""
    gpu = torch.device("cuda", 0)
    found: dict[str, Series] = {}
    with Bar("GPU", (5 * len(DTYPES) + 4) * effort.sizes) as bar:
        for name, dtype in DTYPES.items():
            largest = min(PASS_BYTES, torch.cuda.get_device_properties(gpu).total_memory // 4)
            series = measure_device(gpu, dtype, largest, effort, bar.advance)
            found |= {f"gpu/{kind}/{name}": s for kind, s in series.items()}
        sizes = spaced(2**12, 2**28, effort.sizes)
        found["gpu/host"] = _copies("pinned host to GPU", gpu, None, sizes, effort, bar)
        if torch.cuda.device_count() > 1:
            other = torch.device("cuda", 1)
            found["gpu/link/0-1"] = _copies("GPU 0 to 1", other, gpu, sizes, effort, bar)
            found["gpu/link/both"] = _both_ways(gpu, other, sizes, effort, bar)
    return found


def _copies(
    label: str, to: torch.device, source: torch.device | None, sizes: list[int], effort: Effort, bar: Bar
) -> Series:
    points = []
    for size in sizes:
        bar.advance(f"{label}, {size} bytes")
        target = torch.empty(size, dtype=torch.uint8, device=to)
        if source is None:
            data = torch.zeros(size, dtype=torch.uint8).pin_memory()
        else:
            data = torch.zeros(size, dtype=torch.uint8, device=source)

        def run(target=target, data=data) -> None:
            target.copy_(data, non_blocking=True)

        points.append(sample(run, size, label, effort, Stopwatch(wait=_wait_all)))
    return Series("bytes", tuple(points))


def _both_ways(a: torch.device, b: torch.device, sizes: list[int], effort: Effort, bar: Bar) -> Series:
    points = []
    streams = (torch.cuda.Stream(a), torch.cuda.Stream(b))
    for size in sizes:
        bar.advance(f"GPU 0 and 1 to each other, {size} bytes")
        mine, theirs = (torch.zeros(size, dtype=torch.uint8, device=d) for d in (a, b))
        into_a, into_b = torch.empty_like(mine), torch.empty_like(theirs)

        def run(mine=mine, theirs=theirs, into_a=into_a, into_b=into_b) -> None:
            with torch.cuda.stream(streams[0]):
                into_b.copy_(mine, non_blocking=True)
            with torch.cuda.stream(streams[1]):
                into_a.copy_(theirs, non_blocking=True)

        points.append(sample(run, size, "both ways at once", effort, Stopwatch(wait=_wait_all)))
    return Series("bytes", tuple(points))


def _wait_all() -> None:
    for i in range(torch.cuda.device_count()):
        torch.cuda.synchronize(i)
