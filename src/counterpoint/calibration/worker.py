"""One of the local processes that are measured together: a rank of the cluster that is described."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from counterpoint.calibration.compute import measure_device
from counterpoint.calibration.links import measure_links
from counterpoint.calibration.machine import usable_cores
from counterpoint.calibration.measurement import Series, pooled
from counterpoint.calibration.progress import Bar
from counterpoint.calibration.timing import Effort, Share, Stopwatch
from counterpoint.runtime.transport import Transport
from counterpoint.training.config import ParallelConfig
from counterpoint.training.launch import Worker
from counterpoint.training.mesh import open_processes

STEPS_OF_DEVICE = 5  # series with as many points as the effort says, and the launch
STEPS_OF_LINKS = 9


def measure_ranks(worker: Worker, plan: Path) -> None:
    """Carry out the plan that `calibrate` has left in a file, and leave the results next to it (rank 0).

    The plan: {"effort": fields of Effort, "largest": bytes of one memory pass, "output": file}; with "check": true,
    the cases of `check` are measured instead.
    """
    wanted = json.loads(plan.read_text())
    effort = Effort(**wanted["effort"])
    torch.set_num_threads(1)
    n = worker.world_size
    with open_processes(ParallelConfig(data=1, sequence=(n,)), worker) as processes:
        share = Share()
        bar = Bar(f"{n} ranks at once", (STEPS_OF_DEVICE + STEPS_OF_LINKS) * effort.sizes)
        with bar if worker.rank == 0 else nullcontext():
            cpu = torch.device("cpu")
            together = dist.barrier if n > 1 else lambda: None
            # more ranks than cores take turns, and then waiting for one's turn is part of the time
            stopwatch = Stopwatch(own=n <= usable_cores(), share=share)
            found = measure_device(
                cpu, torch.float32, wanted["largest"], effort, bar.advance, together, stopwatch
            )
            everyone = processes.gather((found, share.value))
            links: dict[str, Series] = {}
            if n > 1:
                transport = Transport(range(n), worker.rank, timeout=60.0)
                links = measure_links(transport, effort, bar.advance)
                dist.barrier()
                transport.close()
        if worker.rank == 0:
            series = {f"core/{name}": pooled([found[name] for found, _ in everyone]) for name in found}
            result = {
                "undisturbed": min(value for _, value in everyone),
                "series": {name: asdict(s) for name, s in (series | links).items()},
            }
            Path(wanted["output"]).write_text(json.dumps(result))
