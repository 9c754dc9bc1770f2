"""Lengths of the sequences of a batch: from a file, or drawn from a synthetic distribution with a seed.

The distributions are synthetic. Each is a lognormal body with a Pareto tail up to the longest context, chosen so that
it has the shares that papers state of the data it is named after (`about`); nothing else of that data is in them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from counterpoint.planner.batch import check_lengths

SHORTEST = 16


@dataclass(frozen=True, slots=True)
class Distribution:
    """body: lognormal with this median and deviation of the logarithm. A share `tail` of the sequences is drawn from a
    Pareto law that begins at `begin` tokens with exponent `alpha`, cut at the longest context."""

    name: str
    about: str
    median: float
    deviation: float
    tail: float
    begin: int
    alpha: float

    def draw(self, count: int, longest: int, seed: int) -> list[int]:
        """`count` lengths of at most `longest` tokens."""
        rng = np.random.default_rng(seed)
        body = self.median * np.exp(self.deviation * rng.standard_normal(count))
        # inverse of the Pareto law's distribution, between `begin` and `longest`
        begin = min(self.begin, longest)
        at_end = (begin / longest) ** self.alpha
        tail = begin * (1.0 - rng.random(count) * (1.0 - at_end)) ** (-1.0 / self.alpha)
        drawn = np.where(rng.random(count) < self.tail, tail, np.minimum(body, longest))
        return [max(SHORTEST, min(longest, int(x))) for x in drawn]


DISTRIBUTIONS: tuple[Distribution, ...] = (
    Distribution("wikipedia-like", "over 96 % of sequences below 8K", 700, 1.0, 0.025, 8192, 1.6),
    Distribution("commoncrawl-like", "a longer tail than wikipedia-like", 900, 1.1, 0.055, 8192, 1.2),
    Distribution(
        "github-like", "of up to 2M: 16.2 % of tokens beyond 128K, 9.8 % beyond 256K", 900, 1.3, 0.075, 8192, 1.28
    ),
    Distribution(
        "byted-like",
        "of up to 2M: about 80 % of sequences at most 4K, 1 % of 128K and more with 44 % of tokens, 37 % beyond 256K",
        700, 1.2, 0.105, 8192, 0.87,
    ),
)  # fmt: skip


def find_distribution(name: str) -> Distribution:
    for known in DISTRIBUTIONS:
        if known.name == name:
            return known
    raise ValueError(
        f"no distribution '{name}'; there are {', '.join(d.name for d in DISTRIBUTIONS)} (synthetic)"
    )


def read_lengths(path: str | Path) -> list[int]:
    """Lengths from a file: a JSON list, or whole numbers between blanks, commas or line ends.

    Raises ValueError for anything else, an empty file, or a length below 1.
    """
    text = Path(path).read_text("utf-8", errors="replace").strip()
    if text.startswith("["):
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not a JSON list ({error})") from None
    else:
        found = []
        for number, line in enumerate(text.splitlines(), 1):
            for word in line.replace(",", " ").split():
                try:
                    found.append(int(word))
                except ValueError:
                    raise ValueError(f"{path}, line {number}: '{word[:40]}' is not a whole number") from None
    try:
        check_lengths(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found


def shares(lengths: Sequence[int], bound: int) -> tuple[float, float]:
    """(share of sequences, share of tokens) in sequences of more than `bound` tokens."""
    long = [s for s in lengths if s > bound]
    return len(long) / len(lengths), sum(long) / sum(lengths)
