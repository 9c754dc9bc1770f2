"""Training of GPT-3-like models on A100 from rates of kernels: where the time of a token goes, by attention kernel.

The device is that of the preset dgx-a100; nothing in it was fitted to these figures. One micro-batch of 8,192 tokens,
float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from counterpoint.cluster.device import Device
from counterpoint.cluster.presets import find_cluster

Attention = Literal["no FlashAttention", "FlashAttention", "FlashAttention-2"]
OTHERS: tuple[Attention, ...] = ("no FlashAttention", "FlashAttention")
MICRO_BATCH = 8192  # tokens
VOCABULARY = 50_257
BYTES = 2


@dataclass(frozen=True, slots=True)
class Training:
    """A model and the length of its sequences."""

    name: str
    parameters: float
    layers: int
    hidden: int
    heads: int
    tokens: int


SMALL, LARGE = ("GPT 1.3B", 1.3e9, 24, 2048, 32), ("GPT 2.7B", 2.7e9, 32, 2560, 32)
PUBLISHED: dict[Training, dict[Attention, float]] = {
    Training(*SMALL, 2048): {"no FlashAttention": 142, "FlashAttention": 189, "FlashAttention-2": 196},
    Training(*LARGE, 2048): {"no FlashAttention": 149, "FlashAttention": 189, "FlashAttention-2": 205},
    Training(*LARGE, 8192): {"no FlashAttention": 80, "FlashAttention": 175, "FlashAttention-2": 225},
}
_LEFT_OUT = (
    "costed from the device's curves, nothing fitted: matrix products, attention, passes of norms, residuals and "
    "activations over memory; left out: optimizer, gradient exchange, the loss but for its product. Micro-batch 8,192 "
    "tokens and 32 heads are assumed"
)
FIRST = 0.325  # of the peak: the middle of the 25 to 40 % that the first FlashAttention is said to reach
NOTES: dict[Attention, str] = {
    "no FlashAttention": "assumed: scores of 32 heads pass through memory 6 times forward and 12 backward, not halved; "
    "the rest as with FlashAttention-2",
    "FlashAttention": "assumed: 32.5 % of the peak, the middle of the published 25 to 40 %; the rest as with "
    "FlashAttention-2",
    "FlashAttention-2": _LEFT_OUT,
}


def flops(run: Training) -> float:
    """Of one sequence, as the paper counts them: 6 S parameters + 12 layers hidden S^2, causal or not."""
    return 6 * run.tokens * run.parameters + 12 * run.layers * run.hidden * run.tokens**2


def teraflops(run: Training, kernel: Attention) -> float:
    """Counted TFLOP/s of one GPU."""
    sequences = MICRO_BATCH / run.tokens
    return sequences * flops(run) / seconds(run, kernel) / 1e12


def faster(run: Training, other: Attention) -> float:
    """How much faster training is with FlashAttention-2 than with another kernel."""
    return seconds(run, other) / seconds(run, "FlashAttention-2")


def seconds(run: Training, kernel: Attention) -> float:
    """Of one micro-batch, forward and backward."""
    device = _device()
    layer = products(run, device) + elementwise(run, device) + attention(run, kernel, device)
    return run.layers * layer + 3 * _product(MICRO_BATCH, run.hidden, VOCABULARY, device)


def products(run: Training, device: Device) -> float:
    """The four products of a layer, and two backward for each."""
    h = run.hidden
    return 3 * sum(
        _product(MICRO_BATCH, a, b, device) for a, b in ((h, 3 * h), (h, h), (h, 4 * h), (4 * h, h))
    )


def elementwise(run: Training, device: Device) -> float:
    """Two norms with residuals read and write four tensors each, the activation two of 4 h; backward twice that."""
    passes = 3 * (2 * 4 + 2 * 4)
    return device.seconds("elementwise", 0, passes * MICRO_BATCH * run.hidden * BYTES, "float16")


def attention(run: Training, kernel: Attention, device: Device) -> float:
    """Attention of a layer: half of the square, at the rate of the kernel; without one, all of it through memory."""
    forward = 4 * MICRO_BATCH * run.tokens * run.hidden
    if kernel == "no FlashAttention":
        scores = MICRO_BATCH * run.tokens * run.heads * BYTES
        return device.seconds("matmul", 3 * forward, 0, "float16") + device.seconds(
            "elementwise", 0, 18 * scores, "float16"
        )
    if kernel == "FlashAttention":
        return 3.5 * forward / 2 / (FIRST * device.peak_flops_per_second["float16"])
    backward = device.seconds("attention_backward", 2.5 * forward / 2, 0, "float16")
    return device.seconds("attention_forward", forward / 2, 0, "float16") + backward


def _product(tokens: int, inner: int, outer: int, device: Device) -> float:
    nbytes = BYTES * (tokens * inner + inner * outer + tokens * outer)
    return device.seconds("matmul", 2 * tokens * inner * outer, nbytes, "float16")


@lru_cache(maxsize=1)
def _device() -> Device:
    return find_cluster("dgx-a100").device(0)
