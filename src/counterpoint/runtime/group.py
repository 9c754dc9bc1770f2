"""Ranks of a mesh that share a sequence, and the layout on which they agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from counterpoint.runtime.engine import Engine
from counterpoint.schedule.place import placed
from counterpoint.schedule.schedule import Schedule
from counterpoint.strategies.sequence.layout import SequenceLayout

Writer = Callable[[Any, int], Schedule]  # a problem, a rank -> its schedule


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks of an engine's mesh that work together, None being all, and this rank's number among them."""

    engine: Engine
    ranks: tuple[int, ...] | None
    place: int

    @classmethod
    def of(cls, engine: Engine, ranks: tuple[int, ...] | None) -> Group:
        """The group of these ranks; ValueError where this rank is not one of them."""
        ranks = None if ranks is None else tuple(ranks)
        return cls(engine, ranks, engine.place_in(ranks))

    @property
    def shape(self) -> tuple[int, ...]:
        """Axes over which the ranks are laid."""
        return self.engine.shape if self.ranks is None else (len(self.ranks),)

    def schedule(self, write: Writer, problem: Any) -> Schedule:
        """This rank's schedule, naming ranks of the mesh."""
        if self.ranks is None:
            return write(problem, self.place)
        return _placed(write, problem, self.place, self.ranks, self.engine.world_size)


@lru_cache(maxsize=1024)
def _placed(write: Writer, problem: Any, place: int, ranks: tuple[int, ...], world_size: int) -> Schedule:
    return placed(write(problem, place), ranks, world_size)


def agreed_layout(group: Group, layout: SequenceLayout | str, tokens: int) -> SequenceLayout:
    """The layout, or the one of this name over as many tokens as the ranks hold; ValueError when they do not fit."""
    engine, ranks = group.engine, group.ranks
    if isinstance(layout, str) and ranks is not None:
        raise ValueError(
            f"ranks {list(ranks)} need a SequenceLayout that says who holds what, got {layout!r}"
        )
    if isinstance(layout, str):
        lengths = engine.local_lengths(tokens)
        layout = SequenceLayout(layout, sum(lengths), engine.world_size)
        expected = [layout.local_tokens(rank) for rank in range(engine.world_size)]
        if lengths != expected:
            raise ValueError(
                f"the ranks hold {lengths} tokens, but a {layout.kind} layout of {layout.tokens} tokens gives them "
                f"{expected}; shard the sequence with SequenceLayout.shard, or pass your SequenceLayout"
            )
        return layout
    size, what = (engine.world_size, "mesh") if ranks is None else (len(ranks), "group")
    if layout.world_size != size:
        raise ValueError(f"the layout is for {layout.world_size} ranks, the {what} has {size}")
    held = layout.local_tokens(group.place)
    if held != tokens:
        raise ValueError(
            f"rank {engine.rank} holds {held} of the layout's {layout.tokens} tokens, but q has {tokens}"
        )
    return layout
