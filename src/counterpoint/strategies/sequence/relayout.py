"""From one layout of a sequence to another: every rank sends each peer the tokens that the peer is to hold.

A rank sends what it holds and is not to keep, once; nothing is sent that is already in place.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd

from counterpoint.kernels.kernel import TensorSpec
from counterpoint.kernels.shape import Assemble, Pick, Place
from counterpoint.kernels.tokens import Run, Tokens
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.schedule import Schedule
from counterpoint.strategies.sequence.layout import SequenceLayout


@lru_cache(maxsize=256)
def relayout_schedule(
    spec: TensorSpec, source: SequenceLayout, target: SequenceLayout, rank: int
) -> Schedule:
    """One rank's steps: given x over its tokens of `source` (dim 1), returns y over its tokens of `target`.

    spec: shape and dtype of x; its size in dim 1 is ignored. Raises ValueError when the layouts differ in the number
    of tokens or ranks.
    """
    if (source.tokens, source.world_size) != (target.tokens, target.world_size):
        raise ValueError(
            f"the layouts hold {source.tokens} tokens on {source.world_size} ranks and {target.tokens} tokens on "
            f"{target.world_size} ranks; both numbers must be equal"
        )
    b = Builder(f"{source.kind} to {target.kind}", rank, source.world_size)
    mine, wanted = source.local(rank), target.local(rank)
    x = b.input("x", spec.with_size(1, mine.count))
    order = [(rank + t) % source.world_size for t in range(source.world_size)]
    leaving = {p: common(mine, target.local(p)) for p in order}
    arriving = {p: common(source.local(p), wanted) for p in order}
    parts = {
        p: b.compute(Pick(tuple(place for place, _ in pairs)), x, names=[f"x_to{p}"])
        for p, pairs in leaving.items()
        if pairs
    }
    received = b.collective(
        "all_to_all",
        "relayout",
        {p: parts[p] for p in order if p != rank and p in parts},
        {
            p: [(f"x_from{p}", spec.with_size(1, sum(place[1] for place, _ in pairs)))]
            for p, pairs in arriving.items()
            if p != rank and pairs
        },
    )
    received |= {rank: parts[rank]} if rank in parts else {}
    if not wanted:
        return b.finish({})
    sources = sorted(received)
    kernel = Assemble(tuple(tuple(place for _, place in arriving[p]) for p in sources))
    return b.finish({"y": b.compute(kernel, *(received[p][0] for p in sources), names=["y"])[0]})


def common(source: Tokens, target: Tokens) -> list[tuple[Place, Place]]:
    """The tokens in both sets, run by run: their places in the source and in the target.

    Both places number the common tokens alike, in the order of this list.
    """
    found, index = [], 0
    for a, run in source.offsets():
        for b, other in target.offsets():
            both = intersection(run, other)
            if both is None:
                continue
            from_source = a + (both.start - run.start) // run.step
            to_target = b + (both.start - other.start) // other.step
            strides = (both.step // run.step, both.step // other.step) if both.count > 1 else (1, 1)
            found.append(
                ((index, both.count, from_source, strides[0]), (index, both.count, to_target, strides[1]))
            )
            index += both.count
    return found


def intersection(a: Run, b: Run) -> Run | None:
    """The positions that two runs share, which form a run again."""
    divisor = gcd(a.step, b.step)
    apart = b.start - a.start
    if apart % divisor:
        return None
    step, modulus = a.step * b.step // divisor, b.step // divisor
    ahead = (
        apart // divisor * pow(a.step // divisor, -1, modulus) % modulus
    )  # solves a.start + ahead a.step in b
    first = a.start + ahead * a.step
    if first < max(a.start, b.start):
        first += -(-(max(a.start, b.start) - first) // step) * step
    last = min(a.last, b.last)
    return Run(first, (last - first) // step + 1, step) if first <= last else None
