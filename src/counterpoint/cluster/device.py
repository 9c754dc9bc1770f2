"""A device: what it attains by kind of work and number format, its memory tiers, its launch cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from counterpoint.cluster.curves import Curve

WorkClass = Literal["matmul", "attention_forward", "attention_backward", "elementwise"]
WORK_CLASSES: tuple[str, ...] = get_args(WorkClass)
DTYPES = ("float64", "float32", "tfloat32", "bfloat16", "float16", "float8", "float4", "int8", "int4")

# Where a device has no figure of its own for a class, the nearest kind of work stands in for it.
_STANDS_IN = {"attention_backward": "attention_forward", "attention_forward": "matmul"}


@dataclass(frozen=True, slots=True)
class MemoryTier:
    """Memory that a device reaches: its size (bytes) and the rate (bytes/s) over the bytes moved.

    `peak_bytes_per_second` is the data sheet's; `attained` is what kernels or copies get.
    """

    name: str
    size_bytes: int
    peak_bytes_per_second: float
    attained: Curve


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator or CPU as the simulator sees it.

    `peak_flops_per_second` per dtype is the data sheet's (dense). `rates` hold, per work class and dtype,
    attained FLOP/s over the FLOPs of one kernel, without the launch. `memory` goes from the tier that
    kernels work in outwards; an outer tier's bandwidth is that of the copy between it and the first tier.
    """

    name: str
    peak_flops_per_second: Mapping[str, float]
    rates: Mapping[str, Mapping[str, Curve]]
    memory: tuple[MemoryTier, ...]
    launch_seconds: float

    @property
    def memory_bytes(self) -> int:
        """Size in bytes of the tier that kernels work in."""
        return self.memory[0].size_bytes

    def tier(self, name: str) -> MemoryTier:
        for tier in self.memory:
            if tier.name == name:
                return tier
        raise ValueError(
            f"device {self.name} has no memory tier '{name}'; it has {', '.join(t.name for t in self.memory)}"
        )

    def rate(self, work_class: WorkClass, dtype: str) -> Curve | None:
        """Attained FLOP/s over FLOPs; None for elementwise work without a table (memory alone bounds it).

        Raises:
            ValueError: the class is unknown, or neither it nor what stands in for it knows the dtype.
        """
        if work_class not in WORK_CLASSES:
            raise ValueError(f"work class '{work_class}' is unknown; use one of {', '.join(WORK_CLASSES)}")
        name: str | None = work_class
        while name is not None:
            if dtype in self.rates.get(name, ()):
                return self.rates[name][dtype]
            name = _STANDS_IN.get(name)
        if work_class == "elementwise":
            return None
        known = sorted({d for table in self.rates.values() for d in table})
        raise ValueError(
            f"device {self.name} has no {work_class} rate for {dtype}; it knows {', '.join(known)}: "
            f"add devices.{self.name}.rates.{work_class}.{dtype} to the cluster file"
        )

    def seconds(self, work_class: WorkClass, flops: float, nbytes: float, dtype: str) -> float:
        """Time (s) of one kernel: launch plus the slower of computing `flops` and moving `nbytes`.

        Raises:
            ValueError: no rate for this class and dtype.
        """
        curve = self.rate(work_class, dtype)
        computing = curve.seconds(flops) if curve else 0.0
        return self.launch_seconds + max(computing, self.memory[0].attained.seconds(nbytes))
