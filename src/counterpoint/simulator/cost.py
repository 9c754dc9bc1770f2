"""What kernels cost: by their work and the device's curves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from counterpoint.cluster.device import Device
from counterpoint.kernels.kernel import Kernel, TensorSpec


def kernel_cost(device: Device, kernel: Kernel, inputs: Sequence[TensorSpec]) -> tuple[float, int]:
    """(seconds, flops) of a kernel. A view takes no time: nothing is launched for it."""
    return KernelCosts(device)(kernel, inputs)


class KernelCosts:
    """(seconds, flops) of kernels on a device; equal work is looked up in the device's curves once."""

    def __init__(self, device: Device) -> None:
        self._seconds = lru_cache(maxsize=None)(device.seconds)

    def __call__(self, kernel: Kernel, inputs: Sequence[TensorSpec]) -> tuple[float, int]:
        work = kernel.work(*inputs)
        if not work.flops and not work.nbytes and kernel.aliases:
            return 0.0, 0
        dtype = inputs[0].dtype if inputs else kernel.outputs()[0].dtype
        return self._seconds(kernel.operator, work.flops, work.nbytes, dtype), work.flops  # type: ignore[arg-type]
