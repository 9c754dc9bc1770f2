"""What a group of ranks takes, as sums over its sequences: layers of every kind, what lies between and around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from counterpoint.planner.batch_probe import GroupStrategy
from counterpoint.planner.layer_work import LayerKind

REST = "embedding, head, loss"
MOVES = "changes of layout"


@dataclass(frozen=True, slots=True)
class Linear:
    """pairs, tokens -> seconds: `pair` a visible pair (of the whole group), `token` a token, `fixed` in any case."""

    pair: float = 0.0
    token: float = 0.0
    fixed: float = 0.0

    def __add__(self, other: Linear) -> Linear:
        return Linear(self.pair + other.pair, self.token + other.token, self.fixed + other.fixed)

    def at(self, pairs: float, tokens: float) -> float:
        return self.pair * pairs + self.token * tokens + self.fixed

    def times(self, factor: float) -> Linear:
        return Linear(factor * self.pair, factor * self.token, factor * self.fixed)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """A layer of a group, forward and backward. time = compute + exposed + max(0, travelling - hiding).

    exposed: messages that computing never hides. travelling: messages under way while computing goes on, which takes
    `hiding`. sent: bytes that a rank sends, mean over the group.
    """

    compute: Linear
    exposed: Linear = Linear()
    travelling: Linear = Linear()
    hiding: Linear = Linear()
    sent: Linear = Linear()

    def seconds(self, pairs: float, tokens: float) -> tuple[float, float]:
        """(computing, exposed messages) of one layer."""
        late = self.travelling.at(pairs, tokens) - self.hiding.at(pairs, tokens)
        return self.compute.at(pairs, tokens), self.exposed.at(pairs, tokens) + max(0.0, late)


@dataclass(frozen=True, slots=True)
class Share:
    """What some layers, or the changes of layout between them, take of a group's time; bytes that a rank sends."""

    name: str
    times: int
    compute: float
    communication: float
    sent_bytes: float


@dataclass(frozen=True)
class GroupCost:
    """Costs of a group of `size` ranks, forward and backward: sums over layers of every kind, and over sequences.

    by_kind: (kind, how many layers, cost of one); changes of layout between layers are a kind too. rest: embedding,
    head, loss.
    """

    size: int
    strategy: GroupStrategy
    by_kind: tuple[tuple[LayerKind, int, LayerCost], ...]
    rest: Linear

    def compute(self, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
        """Seconds of computing that every sequence adds; `fixed` comes once."""
        s = np.asarray(lengths, dtype=np.float64)
        return self._sum(s, lambda c: c.compute) + self.rest.token * s

    def exposed(self, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
        """Seconds of messages that every sequence adds and nothing hides."""
        return self._sum(np.asarray(lengths, dtype=np.float64), lambda c: c.exposed)

    def travelling(self, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
        """Seconds that every sequence adds to messages beyond what its computing hides; may be negative.

        Only a positive sum over all sequences, with its fixed part, takes time.
        """
        s = np.asarray(lengths, dtype=np.float64)
        return self._sum(s, lambda c: c.travelling) - self._sum(s, lambda c: c.hiding)

    @cached_property
    def fixed(self) -> tuple[float, float, float]:
        """What (compute, exposed, travelling) of a group begin with."""
        rows = [(count, cost) for _, count, cost in self.by_kind]
        return (
            self.rest.fixed + sum(n * c.compute.fixed for n, c in rows),
            sum(n * c.exposed.fixed for n, c in rows),
            sum(n * (c.travelling.fixed - c.hiding.fixed) for n, c in rows),
        )

    def seconds(self, lengths: Sequence[int] | np.ndarray) -> tuple[float, float]:
        """(computing, exposed communication) of the group with these sequences."""
        s = np.asarray(lengths, dtype=np.float64)
        tokens = float(s.sum())
        compute, communication = self.rest.at(0.0, tokens), 0.0
        for kind, count, cost in self.by_kind:
            own, exposed = cost.seconds(float(_pairs(s, kind).sum()), tokens)
            compute += count * own
            communication += count * exposed
        return compute, communication

    def shares(self, lengths: Sequence[int] | np.ndarray) -> list[Share]:
        """What every kind of layers takes with these sequences, and what is around the layers."""
        s = np.asarray(lengths, dtype=np.float64)
        tokens = float(s.sum())
        found = []
        for kind, count, cost in self.by_kind:
            pairs = float(_pairs(s, kind).sum())
            compute, exposed = cost.seconds(pairs, tokens)
            sent = cost.sent.at(pairs, tokens)
            found.append(Share(kind.label, count, count * compute, count * exposed, count * sent))
        return [*found, Share(REST, 1, self.rest.at(0.0, tokens), 0.0, 0.0)]

    def _sum(self, s: np.ndarray, part: Callable[[LayerCost], Linear]) -> np.ndarray:
        total = np.zeros_like(s)
        for kind, count, cost in self.by_kind:
            linear = part(cost)
            total += count * (linear.pair * _pairs(s, kind) + linear.token * s)
        return total


def _pairs(s: np.ndarray, kind: LayerKind) -> np.ndarray:
    """`LayerKind.pairs` of many lengths."""
    if kind.type not in ("full_attention", "sliding_attention"):
        return np.zeros_like(s)
    w = s if kind.window is None else np.minimum(s, kind.window)
    return w * (w + 1) / 2 + (s - w) * w


def least_squares(rows: list[list[float]], values: list[float]) -> list[float]:
    """Coefficients of least squared relative errors, none below 0."""
    a, y = np.array(rows), np.array(values)
    if not y.any():
        return [0.0] * a.shape[1]
    a = a / y[:, None]
    scale = np.abs(a).max(axis=0)
    keep = list(range(a.shape[1]))
    while True:
        found = np.linalg.lstsq(a[:, keep] / scale[keep], np.ones(len(y)), rcond=None)[0]
        if (found >= 0).all() or len(keep) == 1:
            break
        keep.pop(int(found.argmin()))
    result = [0.0] * a.shape[1]
    for column, value in zip(keep, found, strict=True):
        result[column] = max(0.0, float(value / scale[column]))
    return result


def waiting(loads: Sequence[float], seconds: Sequence[float]) -> LayerCost:
    """Messages of a layer that took these seconds beyond its computing at these loads (tokens of the group).

    Where more tokens hide more of them, they are travelling; what is left at the largest load, or grows, is exposed.
    """
    first, least = seconds[0], min(seconds)
    slope = (first - seconds[1]) / (loads[1] - loads[0]) if len(loads) > 1 else 0.0
    if slope <= 0.0:
        return LayerCost(Linear(), Linear(0.0, *least_squares([[t, 1.0] for t in loads], list(seconds))))
    travelling = Linear(0.0, 0.0, first - least + slope * loads[0])
    return LayerCost(Linear(), Linear(0.0, 0.0, least), travelling, Linear(0.0, slope, 0.0))
