"""Which rank holds which tokens of a sequence.

Four layouts, for any number of tokens on any number of ranks; shards differ by a few tokens where lengths do not
divide, and nothing is padded:

- contiguous: rank r holds the r-th of N pieces.
- zigzag (head-tail): of 2N pieces rank r holds pieces r and 2N-1-r, so that causal work is equal.
- striped: rank r holds tokens r, r+N, r+2N, ...
- document-zigzag: every packed document is cut into 2N pieces of its own, so that short documents balance too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

from counterpoint.kernels.tokens import Run, Tokens

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS = ("contiguous", "zigzag", "striped", "document-zigzag")


@dataclass(frozen=True)
class SequenceLayout:
    """A layout of `tokens` tokens over `world_size` ranks.

    documents: lengths of the packed documents in order; they must sum to `tokens`. Empty means one document.
    Raises ValueError for an unknown kind, lengths that do not sum up, or sizes below 1.
    """

    kind: str
    tokens: int
    world_size: int
    documents: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in LAYOUTS:
            raise ValueError(f"layout {self.kind!r} is unknown; use one of {', '.join(LAYOUTS)}")
        if self.tokens < 1 or self.world_size < 1:
            raise ValueError(
                f"a layout needs at least 1 token and 1 rank, got {self.tokens} and {self.world_size}"
            )
        if self.documents and (sum(self.documents) != self.tokens or min(self.documents) < 1):
            raise ValueError(
                f"document lengths must be at least 1 and sum to {self.tokens} tokens, "
                f"got {len(self.documents)} lengths with sum {sum(self.documents)}"
            )

    def local(self, rank: int) -> Tokens:
        """The global positions that a rank holds, in local order (ascending)."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank is {rank}; this layout has ranks 0 to {self.world_size - 1}")
        return _local(self, rank)

    def local_tokens(self, rank: int) -> int:
        """How many tokens a rank holds."""
        return self.local(rank).count

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First position of every document."""
        return (0, *accumulate(self.documents[:-1])) if self.documents else (0,)

    def positions(self, rank: int) -> Tensor:
        """Global position of each local token: (local_tokens,) int64."""
        import torch

        runs = [torch.arange(r.start, r.last + 1, r.step) for r in self.local(rank).runs]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64)

    def position_ids(self, rank: int) -> Tensor:
        """Position of each local token inside its document, as rotary embeddings want it: (local_tokens,) int64."""
        import torch

        positions = self.positions(rank)
        starts = torch.tensor(self.starts)
        return positions - starts[torch.searchsorted(starts, positions, right=True) - 1]

    def shard(self, x: Tensor, rank: int, dim: int = 1) -> Tensor:
        """A rank's part of a full tensor whose dim `dim` has `tokens` entries."""
        if x.shape[dim] != self.tokens:
            raise ValueError(f"dim {dim} has {x.shape[dim]} tokens, the layout has {self.tokens}")
        return x.index_select(dim, self.positions(rank).to(x.device))

    def unshard(self, parts: list[Tensor], dim: int = 1) -> Tensor:
        """The full tensor from every rank's part, in rank order."""
        import torch

        if len(parts) != self.world_size:
            raise ValueError(f"got {len(parts)} parts for {self.world_size} ranks")
        order = torch.cat([self.positions(rank) for rank in range(self.world_size)]).to(parts[0].device)
        return torch.cat(parts, dim).index_select(dim, order.argsort())


@lru_cache(maxsize=4096)
def _local(layout: SequenceLayout, rank: int) -> Tokens:
    n, r = layout.world_size, rank
    if layout.kind == "striped":
        return Tokens.of([Run(r, len(range(r, layout.tokens, n)), n)])
    if layout.kind == "contiguous":
        return Tokens.of(_piece(0, layout.tokens, n, i) for i in [r])
    if layout.kind == "zigzag":
        return Tokens.of(_piece(0, layout.tokens, 2 * n, i) for i in (r, 2 * n - 1 - r))
    documents = layout.documents or (layout.tokens,)
    runs, extra = [], 0
    for start, length in zip(layout.starts, documents, strict=True):
        runs += [_piece(start, length, 2 * n, i, extra) for i in (r, 2 * n - 1 - r)]
        extra += length % (2 * n)  # the next document gives its odd tokens to the next pieces
    return Tokens.of(runs)


def _piece(start: int, length: int, pieces: int, index: int, extra: int = 0) -> Run:
    """Piece `index` of a span cut into `pieces` that differ by at most one token; odd tokens go from `extra` on."""
    size, odd = divmod(length, pieces)
    first = extra % pieces  # `odd` pieces from this one on, counted around, are longer
    before = max(0, min(index, first + odd) - first) + max(0, min(index, first + odd - pieces))
    return Run(start + size * index + before, size + int((index - first) % pieces < odd))
