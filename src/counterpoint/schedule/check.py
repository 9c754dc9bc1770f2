"""Is a set of schedules legal? Every check names the rank and the step that break the rule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from counterpoint.kernels.kernel import TensorSpec
from counterpoint.schedule.schedule import Collective, Compute, Copy, Recv, Schedule, Send, Step
from counterpoint.schedule.table import describe

Key = tuple[int, int, str]  # source, destination, channel


class ScheduleError(ValueError):
    """A schedule breaks a rule; the message names the rank and the step."""


def check(schedules: Sequence[Schedule]) -> None:
    """Check the schedules of all ranks, in rank order.

    Raises ScheduleError for: ranks that do not number 0 to world_size - 1; a value used before its definition or
    defined twice; a kernel whose results differ from what the step declares; an accumulator written while something
    else still reads it; a value that is received or computed but never used (it would never be freed); a message
    without a counterpart, or whose counterpart has another type; a deadlock under rendezvous.
    """
    for rank, schedule in enumerate(schedules):
        if (schedule.rank, schedule.world_size) != (rank, len(schedules)):
            raise ScheduleError(
                f"schedule {rank} of {len(schedules)} says it is rank {schedule.rank} of {schedule.world_size}"
            )
        check_values(schedule)
    check_messages(schedules)
    check_progress(schedules)


def check_values(schedule: Schedule) -> None:
    """Definitions, kernel types, writes in place and unused values of one rank."""
    specs: dict[str, TensorSpec] = {v.name: v.spec for v in schedule.inputs}
    for i, step in enumerate(schedule.steps):
        for name in step.reads:
            if name not in specs:
                raise _error(schedule, i, f"reads {name!r} before it is defined")
        for value in step.writes:
            if value.name in specs:
                raise _error(schedule, i, f"defines {value.name!r} a second time")
        if isinstance(step, Compute):
            expected = step.kernel.outputs(*(specs[name] for name in step.reads))
            declared = tuple(v.spec for v in step.writes)
            if expected != declared:
                made, said = ", ".join(map(str, expected)), ", ".join(map(str, declared))
                raise _error(schedule, i, f"makes {made} but declares {said}")
        if not isinstance(step, Send | Recv) and step.stream.endswith((".send", ".recv")):
            raise _error(
                schedule, i, f"runs on stream {step.stream!r}; such names belong to the messages of a channel"
            )
        for peer in _peers(step):
            if not 0 <= peer < schedule.world_size or peer == schedule.rank:
                raise _error(
                    schedule, i, f"names rank {peer}; allowed are the other ranks below {schedule.world_size}"
                )
        specs.update((v.name, v.spec) for v in step.writes)
    for name in schedule.outputs.values():
        if name not in specs:
            raise ScheduleError(f"rank {schedule.rank}: output {name!r} is never defined")
    _check_channels(schedule)
    _check_uses(schedule)


def _check_channels(schedule: Schedule) -> None:
    # Messages and collectives run on different streams: nothing would order those of one channel.
    collective: dict[str, bool] = {}
    for i, step in enumerate(schedule.steps):
        if not isinstance(step, Compute | Copy):
            kind = isinstance(step, Collective)
            if collective.setdefault(step.channel, kind) != kind:
                raise _error(
                    schedule,
                    i,
                    f"uses channel {step.channel!r} for messages and collectives; take two channels",
                )


def _check_uses(schedule: Schedule) -> None:
    root, used = schedule.memory.root, set(schedule.outputs.values())
    inputs = {v.name for v in schedule.inputs}
    readers: dict[str, list[int]] = defaultdict(list)
    for i, step in enumerate(schedule.steps):
        used.update(step.reads)
        for name in {root[name] for name in step.reads}:
            readers[name].append(i)
    for i, step in enumerate(schedule.steps):
        unused = [v.name for v in step.writes if v.name not in used]
        if unused and (not isinstance(step, Compute) or len(unused) == len(step.writes)):
            raise _error(schedule, i, f"defines {unused[0]!r}, which nothing uses: it would never be freed")
        if not (isinstance(step, Compute) and step.kernel.mutates):
            continue
        for shared in {root[step.reads[j]] for j in step.kernel.aliases.values()}:
            if shared in inputs and shared not in schedule.donated:
                raise _error(schedule, i, f"writes into {shared!r}, which belongs to the caller")
            for j in readers[shared]:
                other = schedule.steps[j]
                if other.stream != step.stream and not _after(schedule, min(i, j), max(i, j)):
                    raise _error(
                        schedule, i, f"writes into {shared!r} while {describe(schedule, j)} may still read it"
                    )


def _after(schedule: Schedule, first: int, second: int) -> bool:
    """Does step `second` need, through data, what step `first` makes?"""
    made = {v.name for v in schedule.steps[first].writes}
    for i in range(first + 1, second + 1):
        if made & set(schedule.steps[i].reads):
            if i == second:
                return True
            made.update(v.name for v in schedule.steps[i].writes)
    return False


def check_messages(schedules: Sequence[Schedule]) -> None:
    """Every message has one counterpart of the same type: same number of values, shapes, dtypes, collective kind."""
    sent: dict[Key, list[tuple[int, str, tuple[TensorSpec, ...]]]] = defaultdict(list)
    received: dict[Key, list[tuple[int, str, tuple[TensorSpec, ...]]]] = defaultdict(list)
    for schedule in schedules:
        for i, step in enumerate(schedule.steps):
            kind = step.kind if isinstance(step, Collective) else "message"
            for message in messages(schedule, step):
                (sent if message.outgoing else received)[message.key].append((i, kind, message.specs))
    for key in sorted(sent.keys() | received.keys()):
        source, destination, channel = key
        for n in range(max(len(sent[key]), len(received[key]))):
            if n >= len(received[key]):
                raise _error(
                    schedules[source],
                    sent[key][n][0],
                    f"sends to rank {destination}, which never receives it",
                )
            if n >= len(sent[key]):
                i = received[key][n][0]
                raise _error(schedules[destination], i, f"receives from rank {source}, which never sends it")
            (i, kind, a), (j, other, b) = sent[key][n], received[key][n]
            if (kind, a) != (other, b):
                there = describe(schedules[destination], j)
                expected = f"rank {destination} expects {other} {_types(b)} in {there}"
                raise _error(schedules[source], i, f"sends {kind} {_types(a)} on {channel}, but {expected}")


@dataclass(frozen=True, slots=True)
class Message:
    """One end of a message of a step: who, on which channel, which way, and the types."""

    key: Key
    outgoing: bool
    specs: tuple[TensorSpec, ...]


def messages(schedule: Schedule, step: Step) -> Iterator[Message]:
    """The message ends of a step, on this rank."""
    here = schedule.rank
    if isinstance(step, Send):
        yield Message(
            (here, step.to, step.channel), True, tuple(schedule.values[n].spec for n in step.inputs)
        )
    elif isinstance(step, Recv):
        yield Message((step.source, here, step.channel), False, tuple(v.spec for v in step.outputs))
    elif isinstance(step, Collective):
        for source, values in step.recvs:
            yield Message((source, here, step.channel), False, tuple(v.spec for v in values))
        for to, names in step.sends:
            yield Message((here, to, step.channel), True, tuple(schedule.values[n].spec for n in names))


def check_progress(schedules: Sequence[Schedule]) -> None:
    """Run all ranks without time: steps wait for values, streams, buffers and rendezvous. Stuck means deadlock."""
    ranks = [_Rank(schedule) for schedule in schedules]
    offered: dict[Key, int] = defaultdict(int)
    posted: dict[Key, int] = defaultdict(int)
    work = set(range(len(ranks)))
    while work:
        rank = work.pop()
        work |= ranks[rank].advance(offered, posted) - {rank}
    stuck = [r for r in ranks if not r.done]
    if stuck:
        where = "; ".join(
            f"rank {r.schedule.rank} waits at {describe(r.schedule, r.heads()[0])}" for r in stuck[:4]
        )
        more = f" and {len(stuck) - 4} more ranks" if len(stuck) > 4 else ""
        raise ScheduleError(f"deadlock: {where}{more}")


class _Rank:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.defined = {v.name for v in schedule.inputs}
        self.readers = dict(schedule.memory.readers)
        self.next = dict.fromkeys(schedule.streams, 0)
        self.posts = dict.fromkeys(schedule.streams, 0)  # receives posted, per stream
        self.alive: dict[str, list[set[str]]] = defaultdict(
            list
        )  # channel -> roots of its messages not yet freed
        self.started: dict[int, list[tuple[Key, int]]] = {}

    @property
    def done(self) -> bool:
        return all(n == len(self.schedule.streams[s]) for s, n in self.next.items())

    def heads(self) -> list[int]:
        return sorted(
            self.schedule.streams[s][n] for s, n in self.next.items() if n < len(self.schedule.streams[s])
        )

    def advance(self, offered: dict[Key, int], posted: dict[Key, int]) -> set[int]:
        """Run until nothing moves; returns the ranks that may move now."""
        touched: set[int] = set()
        moved = True
        while moved:
            moved = False
            for stream, indices in self.schedule.streams.items():
                self._post(stream, indices, posted, touched)
                while self.next[stream] < len(indices) and self._finish(
                    indices[self.next[stream]], offered, posted, touched
                ):
                    self.next[stream] += 1
                    moved = True
        return touched

    def _post(self, stream: str, indices: tuple[int, ...], posted: dict[Key, int], touched: set[int]) -> None:
        while self.posts[stream] < len(indices):
            step = self.schedule.steps[indices[self.posts[stream]]]
            if not isinstance(step, Recv) or len(self.alive[step.channel]) >= self.schedule.depth(
                step.channel
            ):
                return
            self.alive[step.channel].append({self.schedule.memory.root[v.name] for v in step.outputs})
            posted[step.source, self.schedule.rank, step.channel] += 1
            touched.add(step.source)
            self.posts[stream] += 1

    def _finish(self, i: int, offered: dict[Key, int], posted: dict[Key, int], touched: set[int]) -> bool:
        step = self.schedule.steps[i]
        if isinstance(step, Recv):
            if self.posts[step.stream] <= self.next[step.stream]:
                return False
            if i not in self.started:
                key = (step.source, self.schedule.rank, step.channel)
                waiting = self.posts[step.stream] - self.next[step.stream]
                later = self.schedule.streams[step.stream][self.next[step.stream] :][:waiting]
                ahead = sum(self.schedule.steps[j].source == step.source for j in later)  # type: ignore[union-attr]
                self.started[i] = [(key, posted[key] - ahead)]
        elif i not in self.started:
            if not all(name in self.defined for name in step.reads):
                return False
            self.started[i] = []
            for message in messages(self.schedule, step):
                counts = offered if message.outgoing else posted
                self.started[i].append((message.key, counts[message.key]))
                counts[message.key] += 1
                touched.add(message.key[1] if message.outgoing else message.key[0])
        if not all(min(offered[key], posted[key]) > n for key, n in self.started[i]):
            return False
        self.defined.update(v.name for v in step.writes)
        memory = self.schedule.memory
        for root in {memory.root[name] for name in step.reads}:
            self.readers[root] -= 1
            if not self.readers[root] and root not in memory.kept:
                for held in self.alive.values():
                    for roots in held:
                        roots.discard(root)
        for channel, held in self.alive.items():
            self.alive[channel] = [roots for roots in held if roots]
        return True


def _peers(step: Step) -> list[int]:
    if isinstance(step, Send):
        return [step.to]
    if isinstance(step, Recv):
        return [step.source]
    if isinstance(step, Collective):
        return [p for p, _ in (*step.sends, *step.recvs)]
    return []


def _types(specs: tuple[TensorSpec, ...]) -> str:
    return "(" + ", ".join(map(str, specs)) + ")"


def _error(schedule: Schedule, index: int, what: str) -> ScheduleError:
    return ScheduleError(f"rank {schedule.rank}, {describe(schedule, index)}: {what}")
