"""Who sees whom among the tokens of many ranks: what of a block must travel, and how far.

Every rank of a large mesh asks the same questions about the same trees of tokens, so answers are remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from counterpoint.kernels.mask import AttentionMask
from counterpoint.kernels.tokens import Tokens, in_order, union
from counterpoint.strategies.sequence.tree import Branches, Tree, leaves, map_tree

_REMEMBERED = 1 << 16


@lru_cache(maxsize=_REMEMBERED)
def seen_by(mask: AttentionMask, keys: Tree, queries: Tree) -> Tree:
    """The part of the keys that any of the queries sees."""
    return _seen(mask, keys, last_queries(mask, queries))


@lru_cache(maxsize=_REMEMBERED)
def seeing(mask: AttentionMask, queries: Tree, keys: Tree) -> Tree:
    """The part of the queries that sees any of the keys."""
    return _seeing(mask, queries, first_keys(mask, keys))


@lru_cache(maxsize=_REMEMBERED)
def seen_ahead(
    mask: AttentionMask, keys: Tree, queries: Tree, start: int, way: int
) -> tuple[tuple[Tree, ...], int]:
    """A walk of the keys past the queries of places start, start + way, ... around the axis, N in all.

    Returns for s = 0..N what of the keys the queries of step s or later see; and the last step at which any of them
    sees any (0 when only those of step 0 do, or none).
    """
    stops = [queries[(start + way * s) % len(queries)] for s in range(len(queries))]
    return _ahead(keys, stops, lambda tree: last_queries(mask, tree), mask.last_queries, mask, _seen)


@lru_cache(maxsize=_REMEMBERED)
def seeing_ahead(mask: AttentionMask, queries: Tree, keys: Tree, start: int, way: int) -> tuple[Tree, ...]:
    """The same for a walk of queries past keys: what of the queries sees keys of step s or later, for s = 0..N."""
    stops = [keys[(start + way * s) % len(keys)] for s in range(len(keys))]
    return _ahead(queries, stops, lambda tree: first_keys(mask, tree), mask.first_keys, mask, _seeing)[0]


@lru_cache(maxsize=_REMEMBERED)
def last_queries(mask: AttentionMask, queries: Tree) -> tuple[Tokens, ...]:
    """A few queries that together see the same keys as all of them."""
    if isinstance(queries, Tokens):
        return tuple(mask.last_queries([queries]))
    return tuple(mask.last_queries(q for part in queries for q in last_queries(mask, part)))


@lru_cache(maxsize=_REMEMBERED)
def first_keys(mask: AttentionMask, keys: Tree) -> tuple[Tokens, ...]:
    """A few keys that together are seen by the same queries as all of them."""
    if isinstance(keys, Tokens):
        return tuple(mask.first_keys([keys]))
    return tuple(mask.first_keys(k for part in keys for k in first_keys(mask, part)))


@lru_cache(maxsize=_REMEMBERED)
def without(tokens: Tree, part: Tree) -> Tree:
    """The tokens that are not in `part`."""
    if isinstance(tokens, Tokens):
        ranges, start = [], 0
        for a, b in union(tokens.locate(part)):
            ranges.append((start, a))
            start = b
        return tokens.pick([*ranges, (start, tokens.count)])
    return Branches(without(t, p) for t, p in zip(tokens, part, strict=True))


@lru_cache(maxsize=_REMEMBERED)
def merged(trees: tuple[Tree, ...]) -> Tree:
    """Trees of the same form as one, rank by rank."""
    if isinstance(trees[0], Tokens):
        return in_order(trees)[0]
    return Branches(merged(tuple(t[i] for t in trees)) for i in range(len(trees[0])))


def _seen(mask: AttentionMask, keys: Tree, deciding: tuple[Tokens, ...]) -> Tree:
    return map_tree(keys, lambda k: mask.seen_by(k, deciding))


def _seeing(mask: AttentionMask, queries: Tree, deciding: tuple[Tokens, ...]) -> Tree:
    return map_tree(queries, lambda q: mask.seeing(q, deciding))


def _ahead(
    walker: Tree,
    stops: list[Tree],
    deciding_of: Callable,
    combine: Callable,
    mask: AttentionMask,
    part: Callable,
) -> tuple[tuple[Tree, ...], int]:
    """From the last stop back: the tokens that decide are those of this stop and of all later ones."""
    deciding: tuple[Tokens, ...] = ()
    found, last = [part(mask, walker, deciding)], 0
    for s in range(len(stops) - 1, -1, -1):
        before, deciding = deciding, tuple(combine((*deciding, *deciding_of(stops[s]))))
        found.append(found[-1] if deciding == before else part(mask, walker, deciding))
        if not last and any(leaves(found[-1])):
            last = s
    return tuple(reversed(found)), last
