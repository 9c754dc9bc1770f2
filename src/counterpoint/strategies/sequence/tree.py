"""Tokens of many ranks: a tree over the axes of a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from counterpoint.kernels.tokens import Tokens

Tree = Any  # Tokens, or Branches


class Branches(tuple):
    """For every rank of an axis its `Tokens`, or the branches over the axes that follow. Knows its hash."""

    def __hash__(self) -> int:
        if "hash" not in self.__dict__:
            self.__dict__["hash"] = tuple.__hash__(self)
        return self.__dict__["hash"]


def depth(tokens: Tree) -> int:
    """How many axes the tree still spans."""
    return 0 if isinstance(tokens, Tokens) else 1 + depth(tokens[0])


def leaves(tokens: Tree) -> list[Tokens]:
    """The tokens of every rank."""
    return [tokens] if isinstance(tokens, Tokens) else [leaf for part in tokens for leaf in leaves(part)]


def map_tree(tokens: Tree, change: Callable[[Tokens], Tokens]) -> Tree:
    """The same tree with every rank's tokens changed; the very same one when nothing changes."""
    if isinstance(tokens, Tokens):
        changed = change(tokens)
        return tokens if changed == tokens else changed
    parts = [map_tree(part, change) for part in tokens]
    return tokens if all(a is b for a, b in zip(parts, tokens, strict=True)) else Branches(parts)
