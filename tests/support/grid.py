"""A fixed grid of attention cases: small, but every pair of values of two factors occurs."""

from __future__ import annotations

from itertools import combinations, product

from support.cases import Case

STRATEGIES = ("ring", "bidirectional_ring", "tokenring", "allgather", "ulysses", "rsa")
WORLD_SIZES = (1, 2, 3, 4, 8)
HEADS = {"MHA": (8, 8), "g=2": (8, 4), "g=3": (9, 3), "g=4": (8, 2), "MQA": (8, 1)}
MASKS = ("causal", "full", "causal window", "full window", "packed", "packed window", "packed full")
LAYOUTS = ("contiguous", "zigzag", "striped", "document-zigzag")
LENGTHS = {
    "even": 64,
    "odd": 61,
    "short": 11,
}  # 11 tokens leave pieces, and on 8 ranks whole ranks, without any


def pairwise(factors: list[tuple]) -> list[tuple]:
    """Rows, one value per factor, in which every pair of values of two factors occurs; greedy, always the same."""
    pairs = {
        (i, a, j, b) for i, j in combinations(range(len(factors)), 2) for a in factors[i] for b in factors[j]
    }
    rows = []
    everything = list(product(*factors))
    while pairs:
        best = max(everything, key=lambda row: sum(pair in pairs for pair in _pairs_of(row)))
        pairs -= set(_pairs_of(best))
        rows.append(best)
    return rows


def _pairs_of(row: tuple) -> list[tuple]:
    return [(i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2)]


def case(strategy: str, world_size: int, heads: str, mask: str, layout: str, length: str) -> Case:
    tokens = LENGTHS[length]
    packed = (1, tokens // 2, tokens // 3) if "packed" in mask else ()
    return Case(
        mesh=(world_size,),
        forward=strategy,
        heads=HEADS[heads][0],
        kv_heads=HEADS[heads][1],
        tokens=tokens,
        causal="full" not in mask,
        window=7 if "window" in mask else None,
        documents=(*packed, tokens - sum(packed)) if packed else (),
        layout=layout,
        wants_lse=True,
    )


def grid(strategy: str) -> dict[str, Case]:
    """The cases of a strategy by a readable name."""
    rows = pairwise([WORLD_SIZES, tuple(HEADS), MASKS, LAYOUTS, tuple(LENGTHS)])
    return {f"{strategy} {' '.join(map(str, row))}": case(strategy, *row) for row in rows}
