"""What this machine is, as the operating system tells it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from counterpoint.calibration.measurement import Machine

_USUAL_CACHE = 32 * 2**20  # where the system does not tell
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def this_machine() -> Machine:
    """This machine and the torch that would run on it."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Machine(
        processor=_processor(),
        cores=usable_cores(),
        memory_bytes=_memory(),
        cache_bytes=last_level_cache(_CACHES),
        accelerators=tuple(torch.cuda.get_device_name(i) for i in range(count)),
        accelerator_bytes=torch.cuda.get_device_properties(0).total_memory if count else 0,
        torch=torch.__version__,
        host=platform.node(),
    )


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def last_level_cache(folder: Path) -> int:
    """Bytes of the largest cache that Linux describes in this folder."""
    sizes = []
    for file in folder.glob("index*/size"):
        text = file.read_text().strip()
        factor = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * factor)
    return max(sizes, default=_USUAL_CACHE)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 8 * 2**30
