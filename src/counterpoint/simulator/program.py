"""A program: the schedules of all ranks on a cluster as flat arrays, which the event loop can run through quickly.

Steps, streams, buffers and messages are numbered over all ranks. Lists of different lengths are stored one after the
other: those of item i stand at positions at[i] to at[i + 1].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = (
    Any  # a numpy array; numbers taken out of it are plain to the compiler, which type checkers cannot see
)

TIMED, SEND, RECV, EXCHANGE, COPY, MEETING = range(6)  # kinds of step


class Program(NamedTuple):
    """What the event loop needs to know; nothing in it changes while it runs."""

    # steps
    rank: Array
    kind: Array
    stream: Array
    following: Array  # the next step of the stream, or -1
    seconds: Array  # duration of a TIMED step
    waits: Array  # how many steps must finish before it starts: producers of its values, and its predecessor
    successors_at: Array
    successors: Array  # steps that read what it makes
    reads_at: Array
    reads: Array  # buffers it reads
    makes_at: Array
    makes: Array  # buffers it allocates
    outgoing_at: Array
    outgoing: Array  # messages it sends; for a MEETING the one meeting it takes part in
    incoming_at: Array
    incoming: Array  # messages it receives
    # streams
    first: Array
    depth: Array  # of streams of receives: messages posted or alive at most; 0 for the others
    # buffers
    buffer_bytes: Array
    buffer_readers: Array  # steps that read it
    buffer_kept: Array  # inputs and outputs are never freed
    buffer_source: Array  # the receive that fills it, or -1
    buffer_fast: Array  # does it lie in the tier that kernels work in
    # messages
    message_sender: Array  # steps
    message_receiver: Array  # -1 for a copy within a rank
    message_bytes: Array
    message_latency: Array  # seconds
    message_limit: Array  # bytes per second that it attains alone
    message_route: Array
    route_at: Array
    route_resources: Array
    route_weights: Array  # how much of the resource a unit of rate takes
    capacity: Array  # of resources, bytes per second
    # collectives that are costed as a whole
    meeting_at: Array
    meeting_steps: Array
    meeting_members: Array
    meeting_seconds: Array
    # ranks
    live: Array  # bytes of the inputs
    limit: Array  # bytes of the tier that kernels work in
    slots: int  # flows under way at a time, at most


def lists(
    owners: list[int] | np.ndarray, items: list[int] | np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """(at, items) of `count` lists, given for every item the list it belongs to; the order in a list is kept."""
    owner, item = np.asarray(owners, np.int64), np.asarray(items, np.int64)
    at = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(owner, minlength=count), out=at[1:])
    in_order = bool(np.all(owner[1:] >= owner[:-1]))
    return at, item if in_order else item[np.argsort(owner, kind="stable")]
