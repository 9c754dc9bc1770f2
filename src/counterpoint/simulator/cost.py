"""What kernels cost: by their work and the device's curves."""

from __future__ import annotations

from collections.abc import Sequence

from counterpoint.cluster.device import Device
from counterpoint.kernels.kernel import Kernel, TensorSpec


def kernel_cost(device: Device, kernel: Kernel, inputs: Sequence[TensorSpec]) -> tuple[float, int]:
    """(seconds, flops) of a kernel. A view takes no time: nothing is launched for it."""
    work = kernel.work(*inputs)
    if not work.flops and not work.nbytes and kernel.aliases:
        return 0.0, 0
    spec = inputs[0] if inputs else kernel.outputs()[0]
    return device.seconds(kernel.operator, work.flops, work.nbytes, spec.dtype), work.flops  # type: ignore[arg-type]
