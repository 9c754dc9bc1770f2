"""One of the local processes that are measured together: a rank of the cluster that is described."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from counterpoint.calibration.check import measure_cases
from counterpoint.calibration.compute import measure_device
from counterpoint.calibration.links import measure_links
from counterpoint.calibration.machine import usable_cores
from counterpoint.calibration.measurement import pooled
from counterpoint.calibration.progress import Bar
from counterpoint.calibration.timing import Advance, Effort, Share, Stopwatch
from counterpoint.runtime.executor import Executor
from counterpoint.runtime.transport import Transport
from counterpoint.training.config import ParallelConfig
from counterpoint.training.launch import Worker
from counterpoint.training.mesh import Processes, open_processes

STEPS_OF_DEVICE = 5  # series with as many points as the effort says, and the launch
STEPS_OF_LINKS = 9  # likewise, and two of one point


def measure_ranks(worker: Worker, plan: Path) -> None:
    """Carry out the plan that `calibrate` has left in a file, and leave the results next to it (rank 0).

    The plan: {"effort": fields of Effort, "largest": bytes of one memory pass, "output": file}; with "check": true,
    the cases of `check` are measured instead.
    """
    wanted = json.loads(plan.read_text())
    effort = Effort(**wanted["effort"])
    torch.set_num_threads(1)
    n = worker.world_size
    with open_processes(ParallelConfig.model_validate({"data": 1, "sequence": [n]}), worker) as processes:
        transport = Transport(range(n), worker.rank, timeout=60.0) if n > 1 else None
        bar = Bar(f"{n} ranks at once", (STEPS_OF_DEVICE + STEPS_OF_LINKS * (n > 1)) * effort.sizes)
        shown = worker.rank == 0 and not wanted.get("check")
        with bar if shown else nullcontext():
            measure = _check if wanted.get("check") else _calibrate
            result = measure(wanted, effort, bar.advance, transport, processes)
        if worker.rank == 0:
            result["series"] = {name: asdict(s) for name, s in result["series"].items()}
            Path(wanted["output"]).write_text(json.dumps(result))
        if transport is not None:
            dist.barrier()
            transport.close()


def _calibrate(
    wanted: Mapping[str, Any],
    effort: Effort,
    advance: Advance,
    transport: Transport | None,
    processes: Processes,
) -> dict[str, Any]:
    share = Share()
    stopwatch = Stopwatch(own=True, share=share)
    found = measure_device(
        torch.device("cpu"),
        torch.float32,
        wanted["largest"],
        effort,
        advance,
        _together(transport),
        stopwatch,
    )
    everyone = processes.gather((found, share.value))
    links = measure_links(Executor(transport), effort, advance) if transport is not None else {}
    series = {f"core/{name}": pooled([found[name] for found, _ in everyone]) for name in found if everyone}
    return {"undisturbed": min((value for _, value in everyone), default=1.0), "series": series | links}


def _check(
    wanted: Mapping[str, Any],
    effort: Effort,
    advance: Advance,
    transport: Transport | None,
    processes: Processes,
) -> dict[str, Any]:
    own = processes.world_size <= usable_cores()
    found = measure_cases(Executor(transport), _together(transport), effort, own)
    everyone = processes.gather(found)
    return {"series": {name: pooled([found[name] for found in everyone]) for name in found if everyone}}


def _together(transport: Transport | None) -> Callable[[], Any]:
    return dist.barrier if transport is not None else lambda: None
