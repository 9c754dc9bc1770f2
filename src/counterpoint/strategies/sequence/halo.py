"""The tokens just before a rank's own, for short convolutions: width - 1 of them, and no further than the document.

A rank that holds fewer is one of several that its right neighbour hears from. Bytes a rank receives forward and sends
backward: the same min(width - 1, tokens of its document to the left) tokens of x.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from counterpoint.kernels.attention import Add
from counterpoint.kernels.kernel import TensorSpec
from counterpoint.kernels.shape import Assemble, Spread, Take
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.schedule import Schedule
from counterpoint.strategies.sequence.layout import SequenceLayout

Range = tuple[int, int]


def halo_range(layout: SequenceLayout, width: int, rank: int) -> Range:
    """The positions (start, stop) of the tokens that a rank wants to see of others."""
    own = layout.local(rank)
    if not own:
        return 0, 0
    first = own.runs[0].start
    document = max(start for start in layout.starts if start <= first)
    return max(document, first - width + 1), first


@lru_cache(maxsize=1024)
def halo_schedule(
    spec: TensorSpec, layout: SequenceLayout, width: int, rank: int, which: Literal["forward", "backward"]
) -> Schedule:
    """Forward: given x over the rank's tokens (dim 1), returns halo. Backward: given dhalo, returns dx.

    spec: shape and dtype of x; its size in dim 1 is ignored. A rank without halo returns none, and one of whose tokens
    nobody wanted any returns no dx. Raises ValueError for a layout that is not contiguous or a width below 1.
    """
    if layout.kind != "contiguous" and layout.world_size > 1:
        raise ValueError(
            f"a convolution takes tokens in order, but the layout is {layout.kind}; use a contiguous one"
        )
    if width < 1:
        raise ValueError(f"a convolution of width {width} has no taps; give a width of at least 1")
    ranks = range(layout.world_size)
    b = Builder(f"{which} halo", rank, layout.world_size)
    wanted = {p: _shared(halo_range(layout, width, rank), _held(layout, p)) for p in ranks}
    given = {p: _shared(halo_range(layout, width, p), _held(layout, rank)) for p in ranks}
    wanted, given = ({p: r for p, r in part.items() if r[0] < r[1]} for part in (wanted, given))
    own = _held(layout, rank)

    def items(part: dict[int, Range]) -> dict[int, list[tuple[str, TensorSpec]]]:
        return {p: [(f"x{p}", spec.with_size(1, r[1] - r[0]))] for p, r in part.items()}

    if which == "forward":
        x = b.input("x", spec.with_size(1, own[1] - own[0]))
        sends = {p: b.compute(Take((_from(r, own[0]),)), x) for p, r in given.items()}
        parts = b.collective("halo", "halo", sends, items(wanted))
        if not parts:
            return b.finish({})
        sizes, at = [r[1] - r[0] for r in wanted.values()], 0
        places = []
        for size in sizes:
            places.append(((0, size, at, 1),))
            at += size
        return b.finish({"halo": b.compute(Assemble(tuple(places)), *(v for (v,) in parts.values()))[0]})
    start, stop = halo_range(layout, width, rank)
    dhalo = b.input("dhalo", spec.with_size(1, stop - start))
    sends = {p: b.compute(Take((_from(r, start),)), dhalo) for p, r in wanted.items()}
    total = None
    for p, (part,) in b.collective("halo", "halo", sends, items(given)).items():
        rows = (_from(given[p], own[0]),)
        kernel = Spread(rows, own[1] - own[0]) if total is None else Add(rows)
        total = b.compute(kernel, *((part,) if total is None else (total, part)), names=("dx",))[0]
    return b.finish({"dx": total} if total is not None else {})


def _held(layout: SequenceLayout, rank: int) -> Range:
    own = layout.local(rank)
    return (own.runs[0].start, own.runs[-1].last + 1) if own else (0, 0)


def _shared(a: Range, b: Range) -> Range:
    return max(a[0], b[0]), min(a[1], b[1])


def _from(part: Range, start: int) -> Range:
    return part[0] - start, part[1] - start
