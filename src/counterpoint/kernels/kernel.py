"""What an operator is: how to do it (`run`), what it makes (`outputs`), what it costs (`work`).

A kernel is a frozen dataclass of plain values, so that a schedule can be printed, compared and stored. It is
described without torch; only `run` needs it. Two executors use kernels: the runtime calls `run`, the
simulator asks for `work`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype name ("float32", "bfloat16", ...) of a tensor."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is unknown; use one of {', '.join(ITEM_BYTES)}")
        if self.shape and min(self.shape) < 0:
            raise ValueError(f"shape {self.shape} has a negative size")

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    def with_size(self, dim: int, size: int) -> TensorSpec:
        """The same tensor with another size of one dim."""
        if self.shape[dim] == size:
            return self
        shape = list(self.shape)
        shape[dim] = size
        return _spec(tuple(shape), self.dtype)

    def cast(self, dtype: str) -> TensorSpec:
        return self if dtype == self.dtype else _spec(self.shape, dtype)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


_spec = lru_cache(maxsize=4096)(
    TensorSpec
)  # long schedules have few types: looking one up is faster than making it


@dataclass(frozen=True, slots=True)
class Work:
    """What an operator costs on any device: floating-point operations, bytes read, bytes written."""

    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    @property
    def nbytes(self) -> int:
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True, slots=True)
class Kernel:
    """Base of all kernels.

    `aliases` maps an output's index to the input whose memory it shares; with `mutates` the kernel writes
    into that memory (an accumulator), without it the output is a view.
    """

    operator: ClassVar[str] = "elementwise"  # the class of rate that a device quotes for it
    mutates: ClassVar[bool] = False

    def outputs(self, *inputs: TensorSpec) -> tuple[TensorSpec, ...]:
        """Specs of the results, given those of the inputs."""
        raise NotImplementedError

    def work(self, *inputs: TensorSpec) -> Work:
        """Cost for inputs of these specs. Default: one pass over all inputs and outputs, no arithmetic."""
        read = sum(x.nbytes for x in inputs)
        return Work(0, read, sum(y.nbytes for y in self.outputs(*inputs)))

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The results, computed with torch."""
        raise NotImplementedError

    @property
    def aliases(self) -> dict[int, int]:
        return {}

    def label(self) -> str:
        """A few characters for tables and pictures."""
        return kernel_name(type(self))


@dataclass(frozen=True, slots=True)
class ViewKernel(Kernel):
    """Base of kernels whose result is a view of their first input: nothing is launched for it."""

    @property
    def aliases(self) -> dict[int, int]:
        return {0: 0}

    def work(self, *inputs: TensorSpec) -> Work:
        return Work()


_REGISTRY: dict[str, type[Kernel]] = {}
K = TypeVar("K", bound=type[Kernel])


def register(name: str) -> Callable[[K], K]:
    """Class decorator: give a kernel the name under which schedules store it."""

    def add(cls: K) -> K:
        assert name not in _REGISTRY, f"two kernels are called {name}"
        _REGISTRY[name] = cls
        return cls

    return add


@cache
def kernel_name(cls: type[Kernel]) -> str:
    return next(name for name, known in _REGISTRY.items() if known is cls)


def kernel_class(name: str) -> type[Kernel]:
    """The class registered under a name. Raises ValueError for an unknown one."""
    if name not in _REGISTRY:
        raise ValueError(f"kernel {name!r} is unknown; known are {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


def torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)
