"""What happened, or would happen: spans per rank and stream, bytes per link, memory over time.

The runtime measures a `Timeline`, the simulator predicts one; both are this type, so the two can be laid
side by side. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

Kind = Literal["compute", "send", "recv", "collective", "copy"]


@dataclass(frozen=True, slots=True)
class Span:
    """One step on one stream of one rank, from `start` to `stop` (seconds on the clock all ranks share).

    For sends, receives and collectives `nbytes` is the payload in bytes that this rank sent (send,
    collective) or received (recv), and `peer` the rank at the other end (None for a collective, whose
    bytes per peer stand in `links`: pairs of (destination rank, bytes sent)). For compute, `flops` is
    the kernel's work. A receive starts when it is posted, so its span includes waiting for the peer.
    `phase` is the part of a larger whole that the step belongs to ("mlp"), "" when nobody said.
    """

    rank: int
    stream: str
    kind: Kind
    name: str
    start: float
    stop: float
    peer: int | None = None
    nbytes: int = 0
    flops: int = 0
    links: tuple[tuple[int, int], ...] = ()
    phase: str = ""

    @property
    def seconds(self) -> float:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class MemoryEvent:
    """Live bytes of schedule values on a rank's device, host copies apart, from `time` (seconds) on."""

    rank: int
    time: float
    live_bytes: int


# in a timeline's meta: the part of a step whose messages and memory were recorded, when not all of them were
RECORDED = "messages and memory of"


class Pending(Protocol):
    """What happened, ready to be written as spans and memory events when somebody asks for them."""

    start: float
    stop: float

    def spans(self) -> list[Span]: ...

    def memory(self) -> list[MemoryEvent]: ...


class Timeline:
    """Spans and memory of all ranks that were merged into it; `source` says who made it.

    `source` is "measured" or "simulated"; `meta` holds what a reader needs to know about the run
    (strategy, shape, machine), as plain JSON values. pending: where spans and memory come from once they are asked
    for; whoever asks for the time alone does not wait for them.
    """

    def __init__(
        self,
        source: str = "measured",
        spans: list[Span] | None = None,
        memory: list[MemoryEvent] | None = None,
        meta: dict[str, Any] | None = None,
        *,
        pending: Pending | None = None,
    ) -> None:
        self.source, self.meta, self._pending = source, {} if meta is None else meta, pending
        if not pending:
            self.spans, self.memory = [] if spans is None else spans, [] if memory is None else memory

    @cached_property
    def spans(self) -> list[Span]:
        return self._made()[0]

    @cached_property
    def memory(self) -> list[MemoryEvent]:
        return self._made()[1]

    def _made(self) -> tuple[list[Span], list[MemoryEvent]]:
        assert self._pending
        self.spans, self.memory, self._pending = self._pending.spans(), self._pending.memory(), None
        return self.spans, self.memory

    def __reduce__(self):
        return Timeline, (self.source, self.spans, self.memory, self.meta)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Timeline) and self.__reduce__() == other.__reduce__()

    __hash__ = None  # type: ignore[assignment]

    # ---- reading -------------------------------------------------------------------------------
    @property
    def ranks(self) -> list[int]:
        return sorted({s.rank for s in self.spans} | {m.rank for m in self.memory})

    @property
    def start(self) -> float:
        return self._pending.start if self._pending else min((s.start for s in self.spans), default=0.0)

    @property
    def stop(self) -> float:
        return self._pending.stop if self._pending else max((s.stop for s in self.spans), default=0.0)

    @property
    def seconds(self) -> float:
        return self.stop - self.start

    def streams(self, rank: int) -> list[str]:
        """Streams of a rank, the compute stream first, then in the order of first use."""
        seen = dict.fromkeys(s.stream for s in sorted(self.spans, key=lambda s: s.start) if s.rank == rank)
        return sorted(seen, key=lambda name: name != "compute")

    def bytes_by_link(self) -> dict[tuple[int, int], int]:
        """Payload bytes per directed link (source rank, destination rank), counted by the sender."""
        total: dict[tuple[int, int], int] = defaultdict(int)
        for s in self.spans:
            if s.kind == "send" and s.peer is not None:
                total[s.rank, s.peer] += s.nbytes
            for destination, nbytes in s.links:
                total[s.rank, destination] += nbytes
        return {link: n for link, n in sorted(total.items()) if n}

    def bytes_sent(self, rank: int) -> int:
        return sum(n for (source, _), n in self.bytes_by_link().items() if source == rank)

    def bytes_received(self, rank: int) -> int:
        return sum(n for (_, destination), n in self.bytes_by_link().items() if destination == rank)

    def peak_bytes(self, rank: int) -> int:
        """Largest number of live bytes of schedule values on a rank."""
        return max((m.live_bytes for m in self.memory if m.rank == rank), default=0)

    def busy(self, rank: int, kinds: Iterable[Kind]) -> list[tuple[float, float]]:
        """Disjoint intervals in which the rank had at least one span of these kinds under way."""
        kinds = set(kinds)
        merged: list[tuple[float, float]] = []
        for a, b in sorted((s.start, s.stop) for s in self.spans if s.rank == rank and s.kind in kinds):
            if merged and a <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], b))
            else:
                merged.append((a, b))
        return merged

    def categories(self, rank: int) -> dict[str, float]:
        """Seconds of a rank by category, over the whole timeline.

        compute: a kernel or a local copy runs; hidden: communication is under way while one runs;
        exposed: communication is under way and nothing runs; idle: neither. compute + exposed + idle
        equals `seconds`.
        """
        compute = self.busy(rank, ("compute", "copy"))
        traffic = self.busy(rank, ("send", "recv", "collective"))
        busy = _length(compute)
        hidden = _overlap(compute, traffic)
        exposed = _length(traffic) - hidden
        return {
            "compute": busy,
            "hidden": hidden,
            "exposed": exposed,
            "idle": max(0.0, self.seconds - busy - exposed),
        }

    # ---- making --------------------------------------------------------------------------------
    @classmethod
    def merge(cls, parts: Iterable[Timeline]) -> Timeline:
        """One timeline from those of single ranks; the first part's source and meta are kept."""
        parts = list(parts)
        whole = cls(source=parts[0].source, meta=dict(parts[0].meta)) if parts else cls()
        for part in parts:
            whole.spans.extend(part.spans)
            whole.memory.extend(part.memory)
        whole.spans.sort(key=lambda s: (s.start, s.rank))
        whole.memory.sort(key=lambda m: (m.time, m.rank))
        return whole

    def split(self) -> dict[int, Timeline]:
        """The timeline of every rank, in ascending order: the inverse of `merge`."""
        parts = {rank: Timeline(self.source, meta=self.meta) for rank in self.ranks}
        for s in self.spans:
            parts[s.rank].spans.append(s)
        for m in self.memory:
            parts[m.rank].memory.append(m)
        return parts

    def shifted(self) -> Timeline:
        """The same timeline with time zero at its first span."""
        zero = self.start
        move = [
            Span(
                s.rank,
                s.stream,
                s.kind,
                s.name,
                s.start - zero,
                s.stop - zero,
                s.peer,
                s.nbytes,
                s.flops,
                s.links,
                s.phase,
            )
            for s in self.spans
        ]
        memory = [MemoryEvent(m.rank, m.time - zero, m.live_bytes) for m in self.memory]
        return Timeline(self.source, move, memory, dict(self.meta))

    # ---- files ---------------------------------------------------------------------------------
    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "meta": self.meta,
            "spans": [asdict(s) for s in self.spans],
            "memory": [asdict(m) for m in self.memory],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Timeline:
        spans = [Span(**{**s, "links": tuple(tuple(x) for x in s["links"])}) for s in data["spans"]]
        return cls(data["source"], spans, [MemoryEvent(**m) for m in data["memory"]], dict(data["meta"]))

    def write(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_json()))

    @classmethod
    def read(cls, path: str | Path) -> Timeline:
        return cls.from_json(json.loads(Path(path).read_text()))

    def to_perfetto(self) -> dict[str, Any]:
        """Chrome trace-event JSON: a process per rank, a thread per stream, a counter for live bytes."""
        zero = self.start
        events: list[dict[str, Any]] = []
        for rank in self.ranks:
            streams = self.streams(rank)
            events.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}})
            for tid, stream in enumerate(streams):
                named = {"ph": "M", "pid": rank, "tid": tid, "name": "thread_name", "args": {"name": stream}}
                events.append(named)
            thread = {stream: tid for tid, stream in enumerate(streams)}
            for s in (s for s in self.spans if s.rank == rank):
                args = {"peer": s.peer, "bytes": s.nbytes, "flops": s.flops}
                events.append(
                    {
                        "ph": "X",
                        "pid": rank,
                        "tid": thread[s.stream],
                        "cat": s.kind,
                        "name": s.name,
                        "ts": (s.start - zero) * 1e6,
                        "dur": s.seconds * 1e6,
                        "args": {key: value for key, value in args.items() if value},
                    }
                )
            for m in (m for m in self.memory if m.rank == rank):
                counter = {"ph": "C", "pid": rank, "name": "live bytes", "ts": (m.time - zero) * 1e6}
                events.append({**counter, "args": {"bytes": m.live_bytes}})
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"source": self.source}}

    def write_perfetto(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_perfetto()))


def _length(intervals: list[tuple[float, float]]) -> float:
    return sum(b - a for a, b in intervals)


def _overlap(first: list[tuple[float, float]], second: list[tuple[float, float]]) -> float:
    total, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        a, b = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        total += max(0.0, b - a)
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return total
