"""One of the local processes that are measured together: a rank of the cluster that is described."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
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
    n = worker.world_size
    torch.set_num_threads(max(1, usable_cores() // n) if "step" in wanted else 1)
    with open_processes(ParallelConfig.model_validate({"data": 1, "sequence": [n]}), worker) as processes:
        transport = Transport(range(n), worker.rank, timeout=60.0) if n > 1 else None
        bar = Bar(f"{n} ranks at once", (STEPS_OF_DEVICE + STEPS_OF_LINKS * (n > 1)) * effort.sizes)
        shown = worker.rank == 0 and not wanted.get("check")
        with bar if shown else nullcontext():
            measure = _step if "step" in wanted else _check if wanted.get("check") else _calibrate
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


def _step(
    wanted: Mapping[str, Any],
    effort: Effort,
    advance: Advance,
    transport: Transport | None,
    processes: Processes,
) -> dict[str, Any]:
    """The parts of one training step; see calibration/step.py."""
    from counterpoint.calibration.modules import measure_attention, measure_modules
    from counterpoint.calibration.step import step_from_json

    step, own = step_from_json(wanted["step"]), torch.get_num_threads() == 1
    share = Share()
    stopwatch = Stopwatch(own=own, share=share)
    together = _together(transport)
    advance("modules of the model")
    attention = partial(measure_attention, step, processes, advance, together, usable_cores())
    first = attention()
    found = measure_modules(step, processes)
    few = replace(effort, sizes=3)
    cpu, largest = torch.device("cpu"), 2**24
    device = measure_device(cpu, torch.float32, largest, few, advance, together, stopwatch)
    found |= {f"core/{name}": s for name, s in device.items()}
    links = measure_links(Executor(transport), effort, advance, training=True) if transport else {}
    again = attention()  # some time later, since a machine's speed drifts
    found |= {name: pooled([first[name], again[name]]) for name in first}
    everyone = processes.gather((found, share.value))
    names = dict.fromkeys(name for found, _ in everyone for name in found)  # ranks have kernels of their own
    series = {name: pooled([f[name] for f, _ in everyone if name in f]) for name in names}
    cores = usable_cores() / processes.world_size if own else 1.0
    given = min((value for _, value in everyone), default=1.0) / min(1.0, cores)
    return {"undisturbed": min(1.0, given), "series": series | links}


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
