"""Messages between ranks over torch.distributed point-to-point operations on the CPU (gloo)."""

from __future__ import annotations

import re
import time
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from counterpoint.runtime.errors import PeerFailure

Handle = tuple[Any, Tensor]  # an operation under way, and the tensor it must keep alive


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
        limit = timedelta(seconds=timeout)
        group = dist.new_group(list(ranks), timeout=limit, backend="gloo", use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        self.group: dist.ProcessGroup | None = group

    def isend(self, values: Iterable[Tensor], to: int, channel: str) -> list[Handle]:
        """Start sending tensors as one message."""
        handles = []
        for value in values:
            value = value.contiguous()
            self.sent[to] += value.numel() * value.element_size()
            handles.append((dist.isend(value, self.ranks[to], group=self.group, tag=_tag(channel)), value))
        return handles

    def irecv(self, values: Iterable[Tensor], source: int, channel: str) -> list[Handle]:
        """Start receiving a message into contiguous tensors."""
        handles = []
        for value in values:
            self.received[source] += value.numel() * value.element_size()
            handles.append(
                (dist.irecv(value, self.ranks[source], group=self.group, tag=_tag(channel)), value)
            )
        return handles

    def wait(self, handles: Iterable[Handle]) -> None:
        """Block until the operations are done. Raises RuntimeError when the peer is gone or does not answer."""
        for work, _ in handles:
            work.wait(timedelta(seconds=self.timeout - self.patience))

    def blame(self, waiting_for: int, step: str, cause: BaseException) -> PeerFailure:
        """The error to raise when waiting for a rank has failed: finds out who is at fault when several are stuck.

        Every rank that fails notes, in the store that started the processes, whom it was waiting for and where.
        Everyone follows the notes; the rank others wait for that left none is the one that died or hangs.
        """
        culprit = waiting_for
        try:
            store = dist.distributed_c10d._get_default_store()  # torch offers no other handle on it
            store.set(self._note(self.rank), str(waiting_for))
            seen, deadline = {self.rank}, time.monotonic() + self.patience
            while culprit not in seen and time.monotonic() < deadline:
                if store.check([self._note(culprit)]):
                    seen.add(culprit)
                    culprit = int(store.get(self._note(culprit)))
                else:
                    time.sleep(0.02)
        except Exception:
            culprit = waiting_for  # the store died with its process; name the rank we know of
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

    def close(self) -> None:
        """Drop the connections, so that peers which still wait for this rank learn of it at once."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None

    def _note(self, rank: int) -> str:
        return f"counterpoint/stuck/{'.'.join(map(str, self.ranks))}/{rank}"


def _tag(channel: str) -> int:
    """A tag that both ends derive from the channel's name."""
    return zlib.crc32(channel.encode()) & 0x7FFFFFFF
