"""Messages between ranks over torch.distributed point-to-point operations on the CPU (gloo)."""

from __future__ import annotations

import re
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from threading import Lock, Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from counterpoint.runtime.errors import PeerFailure

Handle = tuple[Any, Tensor]  # an operation under way, and the tensor it must keep alive


@dataclass(frozen=True, slots=True)
class _Refused:
    """An operation on a connection that is already gone: it fails when it is waited for, as any other would."""

    cause: RuntimeError

    def wait(self, timeout: timedelta) -> None:
        raise self.cause


class Transport:
    """Moves tensors between the ranks of a schedule; `ranks` maps them to global ranks of torch.distributed.

    Messages from one rank to another on one channel arrive in the order in which they were sent. `sent` and
    `received` count payload bytes per peer, for the life of the transport. timeout: seconds without an answer after
    which a peer counts as lost, the search for the culprit included.
    """

    def __init__(self, ranks: Sequence[int], rank: int, *, timeout: float = 300.0) -> None:
        self.ranks, self.rank, self.timeout = tuple(ranks), rank, timeout
        self.patience = min(2.0, timeout / 5)
        self.sent: dict[int, int] = defaultdict(int)
        self.received: dict[int, int] = defaultdict(int)
        self.failure: PeerFailure | None = None
        self._searching, self._closing = Lock(), Lock()
        limit = timedelta(seconds=timeout)
        group = dist.new_group(list(ranks), timeout=limit, backend="gloo", use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        self.group: dist.ProcessGroup | None = group
        self._name = (
            group.group_name
        )  # the same on every rank, another one for the next group of the same ranks

    def isend(self, values: Iterable[Tensor], to: int, channel: str) -> list[Handle]:
        """Start sending tensors as one message."""
        handles = []
        for value in values:
            value = value.contiguous()
            self.sent[to] += value.numel() * value.element_size()
            handles.append(self._post(dist.isend, value, to, channel))
        return handles

    def irecv(self, values: Iterable[Tensor], source: int, channel: str) -> list[Handle]:
        """Start receiving a message into contiguous tensors."""
        handles = []
        for value in values:
            self.received[source] += value.numel() * value.element_size()
            handles.append(self._post(dist.irecv, value, source, channel))
        return handles

    def _post(self, operation: Callable[..., Any], value: Tensor, peer: int, channel: str) -> Handle:
        try:
            if self.group is None:  # torch would take None for the default group
                raise RuntimeError("the connections of this rank were closed when an earlier step failed")
            return operation(value, self.ranks[peer], group=self.group, tag=_tag(channel)), value
        except RuntimeError as cause:
            return _Refused(cause), value

    def wait(self, handles: Iterable[Handle]) -> None:
        """Block until the operations are done. Raises RuntimeError when the peer is gone or does not answer."""
        for work, _ in handles:
            work.wait(timedelta(seconds=self.timeout - self.patience))

    def exchange_count(self, count: int) -> list[int]:
        """One number of every rank, in rank order; not counted as payload. Raises PeerFailure like a step."""
        found = torch.zeros(len(self.ranks), dtype=torch.int64)
        found[self.rank] = count
        peers = [r for r in range(len(self.ranks)) if r != self.rank]
        posted = [(r, self._post(dist.irecv, found[r : r + 1], r, "count")) for r in peers]
        posted += [(r, self._post(dist.isend, found[self.rank : self.rank + 1], r, "count")) for r in peers]
        for peer, handle in posted:
            try:
                self.wait([handle])
            except RuntimeError as cause:
                failure = self.blame(
                    peer, "step 0 (telling each other how many tokens every rank holds)", cause
                )
                self.close()
                raise failure from None
        return found.tolist()

    def blame(self, waiting_for: int, step: str, cause: BaseException) -> PeerFailure:
        """The error to raise when waiting for a rank has failed: finds out who is at fault when several are stuck.

        Every rank that fails notes, in the store that started the processes, whom it was waiting for. Everyone
        follows the notes; the rank others wait for that left none is the one that died or hangs. All streams of a
        rank raise the first one's error.
        """
        with self._searching:
            if self.failure is None and self.group is None:
                raise cause
            if self.failure is None:
                self.failure = self._search(waiting_for, step, cause)
            return self.failure

    def _search(self, waiting_for: int, step: str, cause: BaseException) -> PeerFailure:
        found: list[int] = []
        # A store kept by a rank that hangs does not answer and knows no timeout, so it is asked from a thread.
        asking = Thread(target=self._follow_notes, args=(waiting_for, found), daemon=True)
        asking.start()
        asking.join(self.patience + 0.2)
        if found:
            culprit = found[0]
        else:  # The store is gone: with torch.distributed, it lives in rank 0 unless a launcher keeps it.
            culprit = self.ranks.index(0) if 0 in self.ranks else waiting_for
        if culprit == self.rank:
            culprit = waiting_for
        via = "" if culprit == waiting_for else f", through rank {waiting_for} that waited in turn"
        said = re.sub(r"^\[[^]]*\.cc:\d+\] ", "", str(cause).strip()).splitlines() or [type(cause).__name__]
        short = said[0].split(". ")[0]
        return PeerFailure(
            f"rank {culprit} died or stopped answering: rank {self.rank} waited for it at {step}{via} "
            f"(timeout {self.timeout:g} s). Start the run again, from a checkpoint if there is one. [{short}]",
            rank=culprit,
            step=step,
        )

    def _follow_notes(self, waiting_for: int, found: list[int]) -> None:
        """Put the rank at fault into `found`, unless the store cannot be reached."""
        try:
            store = dist.distributed_c10d._get_default_store()  # torch offers no other handle on it
            store.set(self._note("waits", self.rank), str(waiting_for))
            culprit, seen, deadline = waiting_for, {self.rank}, time.monotonic() + self.patience
            while culprit not in seen and time.monotonic() < deadline:
                if store.check([self._note("waits", culprit)]):
                    seen.add(culprit)
                    culprit = int(store.get(self._note("waits", culprit)))
                else:
                    time.sleep(0.02)
            found.append(culprit)
            # The process that keeps the store must not end before the others have read it; and they fail only now.
            self.close()
            store.set(self._note("knows", self.rank), "")
            others = [self._note("knows", r) for r in range(len(self.ranks)) if r not in (culprit, self.rank)]
            while self.ranks[self.rank] == 0 and time.monotonic() < deadline and not store.check(others):
                time.sleep(0.02)
        except Exception:
            return

    def close(self) -> None:
        """Drop the connections, so that peers which still wait for this rank learn of it at once."""
        with self._closing:
            group, self.group = self.group, None
            if group is not None and dist.is_initialized():
                dist.destroy_process_group(group)

    def _note(self, what: str, rank: int) -> str:
        return f"counterpoint/{what}/{self._name}/{rank}"


def _tag(channel: str) -> int:
    """A tag that both ends derive from the channel's name."""
    return zlib.crc32(channel.encode()) & 0x7FFFFFFF
