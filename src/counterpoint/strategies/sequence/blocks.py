"""The nouns of sequence-parallel attention: axes, blocks, and the tokens they cover.

A `Block` is some tensors over the same tokens: Q; K and V; a partial output with its logsumexp. Strategies nest: a
strategy on one axis of the mesh calls `attend`, which is the strategy of the next axis or, at the end, the attention
kernel. So the tokens of a block are a tree: for every rank of the axis, for every rank of the next axis, `Tokens`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from counterpoint.kernels.kernel import TensorSpec
from counterpoint.schedule.schedule import Value
from counterpoint.strategies.sequence.tree import Tree


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the mesh as one rank sees it: the ranks along it, and this rank's place among them."""

    ranks: tuple[int, ...]
    rank: int
    prefix: str = ""  # keeps the channels of different axes apart

    @property
    def size(self) -> int:
        return len(self.ranks)

    def __getitem__(self, place: int) -> int:
        """The rank at a place along the axis, counted around."""
        return self.ranks[place % self.size]

    def channel(self, name: str) -> str:
        return self.prefix + name


@dataclass(frozen=True, slots=True)
class Block:
    """Tensors of this rank over the same tokens, (B, tokens, heads, ...) each.

    tokens: which tokens, for every rank of the axes still to be split. heads: first and last+1 head, numbered over
    the whole model. values is empty when this rank's part has no tokens; specs then still tell the types.
    """

    values: tuple[Value, ...]
    specs: tuple[TensorSpec, ...]
    tokens: Tree
    heads: tuple[int, int]

    def __bool__(self) -> bool:
        return bool(self.values)

    def over(self, tokens: Tree) -> Block:
        """The same tensors, said to cover these tokens."""
        return Block(self.values, self.specs, tokens, self.heads)


Attention = Callable[[Block, Block], Block]  # (q), (k, v) -> (out, lse)
AttentionBackward = Callable[
    [Block, Block], tuple[Block, Block]
]  # (q, dout, lse, delta), (k, v) -> (dq), (dk, dv)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes of an attention: batch rows, query heads, key/value heads, head dim, dtype name, softmax scale."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "float32"
    scale: float | None = None

    def __post_init__(self) -> None:
        if min(self.batch, self.heads, self.kv_heads, self.head_dim) < 1:
            raise ValueError(f"batch, heads, kv_heads and head_dim must be at least 1, got {self}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} query heads over {self.kv_heads} key/value heads: give a multiple of the second"
            )

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale


def kv_heads_of(shape: AttentionShape, heads: tuple[int, int]) -> tuple[int, int]:
    """The key/value heads that a range of query heads needs."""
    return heads[0] // shape.group, -(-heads[1] // shape.group)


def split_evenly(count: int, parts: int) -> list[tuple[int, int]]:
    """Ranges (start, stop) of `parts` neighbouring pieces of `count` that differ by at most one."""
    return [(count * i // parts, count * (i + 1) // parts) for i in range(parts)]
