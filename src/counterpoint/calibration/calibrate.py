"""Measures the whole machine: memory, all cores in one process, then ranks of one thread each with their links."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from counterpoint.calibration.compute import measure_device
from counterpoint.calibration.gpu import measure_gpus
from counterpoint.calibration.measurement import Calibration, Machine, Series, series_from
from counterpoint.calibration.progress import Bar
from counterpoint.calibration.stream import stream
from counterpoint.calibration.timing import Effort
from counterpoint.files import scratch
from counterpoint.training.launch import launch

TIMES_CACHE = 4  # an array of STREAM, in last-level caches


def calibrate(
    machine: Machine,
    ranks: int,
    effort: Effort,
    environ: Mapping[str, str],
    *,
    gpus: bool = False,
    quick: bool = False,
) -> Calibration:
    """Measure this machine; shows its progress on the terminal.

    ranks: processes of one thread each that are measured together; with gpus, the GPUs are measured instead.
    environ: for the workers. quick: what the calibration says of itself.

    Raises:
        ValueError: not enough memory for the arrays that STREAM needs.
        WorkerFailure: a worker ended badly.
    """
    array = TIMES_CACHE * machine.cache_bytes
    if 4 * array > machine.memory_bytes:
        raise ValueError(
            f"STREAM needs three arrays of {array / 2**20:.0f} MiB, {TIMES_CACHE} times the last-level cache each; "
            f"this machine has {machine.memory_bytes / 2**20:.0f} MiB of memory: use a machine with more"
        )
    series = _all_cores(machine, array, effort)
    undisturbed = 1.0
    if gpus:
        series |= measure_gpus(effort)
    else:
        largest = max(3 * array // ranks, 2**20)
        found = run_workers(ranks, {"effort": asdict(effort), "largest": largest}, environ)
        undisturbed = found["undisturbed"]
        series |= series_from(found["series"])
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return Calibration(machine, date, ranks, gpus, quick, undisturbed, series)


def _all_cores(machine: Machine, array_bytes: int, effort: Effort) -> dict[str, Series]:
    """STREAM on one to all cores, and the rates of one process with all of them."""
    counts = sorted({1, machine.cores} | {1 << i for i in range(machine.cores.bit_length())})
    series: dict[str, Series] = {}
    with Bar("all cores", len(counts) + 5 * effort.sizes + 1) as bar:
        for threads in counts:
            bar.advance(f"STREAM on {threads} thread{'s' if threads > 1 else ''}")
            found = stream(threads, array_bytes, effort.repeats)
            series |= {f"stream/{name}/{threads}": s for name, s in found.items()}
        before = torch.get_num_threads()
        torch.set_num_threads(machine.cores)
        try:
            found = measure_device(torch.device("cpu"), torch.float32, 3 * array_bytes, effort, bar.advance)
        finally:
            torch.set_num_threads(before)
    return series | {f"all-cores/{name}": s for name, s in found.items()}


def run_workers(ranks: int, plan: Mapping[str, Any], environ: Mapping[str, str]) -> Any:
    """What rank 0 of `ranks` local workers found when they carried out a plan (see `worker`).

    Raises:
        WorkerFailure: a worker ended badly; KeyboardInterrupt: a stop signal ended them.
    """
    with scratch() as folder:
        file, output = Path(folder, "plan.json"), Path(folder, "found.json")
        file.write_text(json.dumps({**plan, "output": str(output)}))
        if launch(["-m", "counterpoint", "calibrate", "--plan", str(file)], ranks, environ):
            raise KeyboardInterrupt
        return json.loads(output.read_text())
