"""The plan of one global batch of ragged sequences: who computes which sequences, together with whom, when.

Every solver gives this type and every executor takes it. Lengths go in; micro-batches come out, each with groups of
ranks of any size, the sequences that each group shares, and how much of their activations it offloads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that work on some sequences together: every one of the sequences is split over all of them.

    ranks: of the world, ascending, any number. sequences: indices into the lengths of the plan. offload: share (0 to
    1) of what the backward pass needs that goes to host memory meanwhile.
    """

    ranks: tuple[int, ...]
    sequences: tuple[int, ...]
    offload: float = 0.0


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Groups that work at the same time, without a common rank. Ranks in none of them have nothing to do in it."""

    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Micro-batches in order; each sequence is in exactly one group of one of them.

    synchronous: all ranks end a micro-batch together (state sharding with a collective in every layer); else a rank
    goes through its own groups in order without waiting for the others, so that ranks may have more or fewer
    micro-batches. seconds: predicted time of the batch, forward and backward; 0 when nothing was predicted.
    """

    lengths: tuple[int, ...]
    world_size: int
    micro_batches: tuple[MicroBatch, ...]
    solver: str
    synchronous: bool = False
    seconds: float = 0.0

    def __post_init__(self) -> None:
        check_lengths(self.lengths)
        placed: list[int] = []
        for number, micro_batch in enumerate(self.micro_batches):
            ranks = [rank for group in micro_batch.groups for rank in group.ranks]
            if len(set(ranks)) != len(ranks) or any(not 0 <= rank < self.world_size for rank in ranks):
                raise ValueError(
                    f"micro-batch {number} uses ranks {ranks}; give each of the ranks 0 to "
                    f"{self.world_size - 1} at most once"
                )
            for group in micro_batch.groups:
                if not group.ranks or not group.sequences or list(group.ranks) != sorted(group.ranks):
                    raise ValueError(
                        f"micro-batch {number}: a group needs ranks in ascending order and sequences, got {group}"
                    )
                if not 0.0 <= group.offload <= 1.0:
                    raise ValueError(
                        f"micro-batch {number}: offload {group.offload:g} is not between 0 and 1"
                    )
                placed += group.sequences
        if sorted(placed) != list(range(len(self.lengths))):
            wrong = sorted(set(range(len(self.lengths))).symmetric_difference(placed))[:5]
            raise ValueError(
                f"every one of {len(self.lengths)} sequences belongs in exactly one group; look at sequences "
                f"{wrong or sorted({i for i in placed if placed.count(i) > 1})[:5]}"
            )

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def of_rank(self, rank: int) -> list[tuple[int, Group]]:
        """(number of the micro-batch, group) of all work of a rank, in order."""
        return [
            (number, group)
            for number, micro_batch in enumerate(self.micro_batches)
            for group in micro_batch.groups
            if rank in group.ranks
        ]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BatchPlan:
        """The plan that `to_json` wrote. Raises ValueError for one that is incomplete or impossible."""
        try:
            rows = [
                MicroBatch(
                    tuple(
                        Group(tuple(g["ranks"]), tuple(g["sequences"]), float(g.get("offload", 0.0)))
                        for g in row["groups"]
                    )
                )
                for row in data["micro_batches"]
            ]
            rest = {key: data[key] for key in ("synchronous", "seconds") if key in data}
            return cls(tuple(data["lengths"]), data["world_size"], tuple(rows), data["solver"], **rest)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a batch plan: {error!r}") from None


def check_lengths(lengths: Sequence[int]) -> None:
    """Raise ValueError for an empty batch or a sequence without tokens."""
    if not lengths:
        raise ValueError("the batch is empty; give the lengths of at least one sequence")
    for index, length in enumerate(lengths):
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(
                f"sequence {index} has length {length!r}; lengths are whole numbers of at least 1"
            )
