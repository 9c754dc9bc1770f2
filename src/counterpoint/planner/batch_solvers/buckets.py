"""Sequences in a few buckets, each counted with its longest length: fewer variables (FlexSP, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sequences (indices into the lengths, longest first) that count as `bound` tokens each."""

    bound: int
    sequences: tuple[int, ...]


def optimal_buckets(lengths: Sequence[int], count: int = 16) -> list[Bucket]:
    """At most `count` buckets of neighbouring lengths with the least tokens added by rounding up, exactly.

    err[k][q] = min over j of err[j][q-1] + sum of (s_k - s_i) for i in j+1..k, over ascending lengths.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    values, firsts = np.unique(np.array([lengths[i] for i in order]), return_index=True)
    ends = np.append(firsts, len(order))  # value v covers positions ends[v] to ends[v+1]
    sums = np.concatenate([[0], np.cumsum(np.array([lengths[i] for i in order], dtype=np.float64))])[ends]
    n, count = len(values), min(count, len(values))
    error = np.full(n + 1, np.inf)
    error[0] = 0.0
    cuts = np.zeros((count, n + 1), dtype=np.int64)
    for q in range(count):
        found = np.full(n + 1, np.inf)
        for k in range(1, n + 1):
            added = values[k - 1] * (ends[k] - ends[:k]) - (sums[k] - sums[:k])
            total = error[:k] + added
            cuts[q, k] = int(total.argmin())
            found[k] = total[cuts[q, k]]
        error = found
    buckets, k = [], n
    for q in range(count - 1, -1, -1):
        j = int(cuts[q, k])
        buckets.append(Bucket(int(values[k - 1]), tuple(order[ends[j] : ends[k]][::-1])))
        k = j
    return buckets[::-1]


def even_buckets(lengths: Sequence[int], count: int = 16) -> list[Bucket]:
    """Buckets of equal width up to the longest length, counted with their upper end; empty ones are left out."""
    width = max(lengths) / count
    inside: dict[int, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        inside.setdefault(min(count - 1, int((lengths[i] - 1e-9) // width)), []).append(i)
    return [Bucket(round(width * (b + 1)), tuple(inside[b])) for b in sorted(inside)]


def quantile_buckets(lengths: Sequence[int], count: int = 16) -> list[Bucket]:
    """Buckets of about equally many sequences, counted with their longest."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    parts = [part.tolist() for part in np.array_split(np.array(order), min(count, len(order)))]
    return [Bucket(lengths[part[-1]], tuple(part[::-1])) for part in parts]


def token_error(lengths: Sequence[int], buckets: Sequence[Bucket]) -> float:
    """Tokens that rounding up adds, as a share of all tokens."""
    return sum(b.bound * len(b.sequences) for b in buckets) / sum(lengths) - 1.0


def cut_evenly(lengths: Sequence[int], pieces: int) -> list[list[int]]:
    """The sequences sorted by length and cut into consecutive pieces so that the largest has the fewest tokens.

    FlexSP's sequence blaster: micro-batches of similar lengths. Exact, by bisection over the size of the largest.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    if not 1 <= pieces <= len(order):
        raise ValueError(f"{len(order)} sequences cannot be cut into {pieces} pieces")

    def cut(most: int) -> list[list[int]]:
        found: list[list[int]] = [[]]
        total = 0
        for left, i in zip(range(len(order), 0, -1), order, strict=True):
            must = left == pieces - len(found)  # one sequence for every piece still to come
            if found[-1] and (total + lengths[i] > most or must):
                found.append([])
                total = 0
            found[-1].append(i)
            total += lengths[i]
        return found

    low, high = max(max(lengths), -(-sum(lengths) // pieces)), sum(lengths)
    while low < high:
        middle = (low + high) // 2
        if len(cut(middle)) <= pieces:
            high = middle
        else:
            low = middle + 1
    return cut(high)
