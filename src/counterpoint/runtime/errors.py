"""What the runtime raises."""

from __future__ import annotations


class PeerFailure(RuntimeError):
    """A rank died, hung or failed while others were waiting for it.

    rank: the rank held responsible, in the numbering of the schedule. step: what this rank was waiting for.
    """

    def __init__(self, message: str, *, rank: int, step: str) -> None:
        super().__init__(message)
        self.rank, self.step = rank, step
