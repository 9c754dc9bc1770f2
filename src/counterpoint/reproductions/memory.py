"""Memory of a transformer in training as "Sequence Parallelism" counts it: tensor against sequence parallelism.

Elements of the MLP and the attention block of a layer: weights with their gradients and the two moments of Adam, and
activations. B batch, L sequence length, H hidden size, Z heads of A, N devices (tables 1 and 2 of arXiv 2105.13120).
What the tables leave out (embeddings, logits, norms, dropout masks, the framework) is left out here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Way = Literal["tensor", "sequence"]
FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class Transformer:
    """Sizes of a model; `layers` are those of one device (a pipeline stage may hold half of one)."""

    layers: float
    hidden: int
    heads: int
    head_size: int


BERT_BASE = Transformer(12, 768, 12, 64)


def mlp(way: Way, B: float, L: float, H: int, N: int) -> float:
    """Elements of the MLP block of one layer on one device."""
    if way == "tensor":
        return 32 * H**2 / N + 4 * B * L * H / N + B * L * H
    return 32 * H**2 + 5 * B * L * H / N


def attention(way: Way, B: float, L: float, H: int, Z: int, A: int, N: int) -> float:
    """Elements of the attention block of one layer on one device."""
    rows = 4 * B * L * Z * A / N + B * Z * L**2 / N
    if way == "tensor":
        return 16 * A * Z * H / N + rows + B * L * H
    return 16 * A * Z * H + rows + B * L * H / N


def device_bytes(way: Way, model: Transformer, B: float, L: float, N: int) -> float:
    """Bytes on one device, in float32."""
    H, Z, A = model.hidden, model.heads, model.head_size
    return FLOAT32 * model.layers * (mlp(way, B, L, H, N) + attention(way, B, L, H, Z, A, N))


def largest(fits: Callable[[float], bool]) -> float:
    """The largest size that fits, to one part in a billion."""
    low, high = 0.0, 1.0
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
