"""All-gather of one tensor per rank over nodes of several devices, as a library with one port per device does it."""

from __future__ import annotations

from math import prod

from counterpoint.kernels.kernel import TensorSpec
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.schedule import Schedule


def all_gather(mesh: tuple[int, int], rank: int, spec: TensorSpec) -> Schedule:
    """Every rank's tensor to all ranks: first across nodes between equal local ranks, then inside the node.

    Nothing crosses a node's border twice. A reduce-scatter is its mirror image, with the same bytes on the same
    links. mesh: (nodes, devices of a node). A rank sends (P-1) tensors.
    """
    nodes, local = mesh
    node, place = divmod(rank, local)
    b = Builder("all-gather", rank, prod(mesh))
    own = b.input("x", spec)
    across = [n * local + place for n in range(nodes) if n != node]
    received = b.collective(
        "all_gather", "across", {p: [own] for p in across}, {p: [(f"x{p}", spec)] for p in across}
    )
    here = {rank: own, **{p: values[0] for p, values in received.items()}}
    within = [node * local + i for i in range(local) if i != place]
    arrived = b.collective(
        "all_gather",
        "within",
        {p: list(here.values()) for p in within},
        {p: [(f"x{n * local + p % local}", spec) for n in range(nodes)] for p in within},
    )
    everything = [*here.values(), *(v for values in arrived.values() for v in values)]
    return b.finish({value.name: value for value in everything})
