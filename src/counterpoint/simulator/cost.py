"""What kernels cost: by their work and the device's curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from counterpoint.cluster.device import Device
from counterpoint.kernels.kernel import Kernel, TensorSpec
from counterpoint.kernels.module import Module

# (seconds, flops) of a kernel for inputs of these types; and what says so for a device
Cost = Callable[[Kernel, Sequence[TensorSpec]], tuple[float, int]]
Costs = Callable[[Device], Cost]


def kernel_cost(device: Device, kernel: Kernel, inputs: Sequence[TensorSpec]) -> tuple[float, int]:
    """(seconds, flops) of a kernel. A view takes no time: nothing is launched for it."""
    return KernelCosts(device)(kernel, inputs)


class KernelCosts:
    """(seconds, flops) of kernels on a device; equal kernels for equal inputs are costed once.

    A module takes as long as its operators, one after the other.
    """

    def __init__(self, device: Device) -> None:
        self._seconds = lru_cache(maxsize=None)(device.seconds)
        self._known: dict[tuple, tuple[float, int]] = {}

    def __call__(self, kernel: Kernel, inputs: Sequence[TensorSpec]) -> tuple[float, int]:
        key = kernel, *inputs
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._cost(kernel, inputs)
        return known

    def _cost(self, kernel: Kernel, inputs: Sequence[TensorSpec]) -> tuple[float, int]:
        if isinstance(kernel, Module):
            works = [(o.operator, o.work.flops, o.work.nbytes, o.dtype) for o in kernel.operators]
            return sum(self._seconds(*work) for work in works), sum(work[1] for work in works)  # type: ignore[arg-type]
        work = kernel.work(*inputs)
        if not work.flops and not work.nbytes and kernel.aliases:
            return 0.0, 0
        dtype = inputs[0].dtype if inputs else kernel.outputs()[0].dtype
        return self._seconds(kernel.operator, work.flops, work.nbytes, dtype), work.flops  # type: ignore[arg-type]
