"""An endless, resumable stream of ragged global batches: whole documents of their own lengths, not packed.

What a batch holds is a function of corpus, tokenizer, seed and the configuration of the batch alone, never of the
number of processes. Drawing a batch only counts tokens; `read` gives those of one sequence to whoever needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

from counterpoint.training.corpus import Corpus
from counterpoint.training.packing import Batch, Segment, pack
from counterpoint.training.reader import Position, TokenReader
from counterpoint.training.tokenizer import Tokenizer

_STATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sequence lies in the corpus: its first token and how many there are."""

    position: Position
    length: int


@dataclass(frozen=True, slots=True)
class BatchSize:
    """When a global batch is full: at `sequences` sequences, or before it would exceed `tokens` tokens."""

    tokens: int | None = None
    sequences: int | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.sequences is None):
            raise ValueError("a batch is measured in tokens or in sequences; give one of them")
        if (self.tokens or self.sequences or 0) < 1:
            raise ValueError("the batch is empty; give at least 1 token or 1 sequence")

    def full(self, lengths: Sequence[int], following: int) -> bool:
        """Whether a sequence of `following` tokens belongs in the next batch."""
        if self.sequences is not None:
            return len(lengths) == self.sequences
        assert self.tokens is not None
        return bool(lengths) and sum(lengths) + following > self.tokens


class RaggedStream:
    """Draws batches of sequences in the order of the corpus, shuffled per epoch.

    A document is a sequence; one that is longer than `longest` tokens becomes several, of which each but the last has
    so many. With `lengths` the text is cut into sequences of these lengths instead, over and over. Raises ValueError
    when the corpus holds no text or a loaded state belongs to another stream.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        size: BatchSize,
        longest: int,
        seed: int,
        lengths: Sequence[int] = (),
    ) -> None:
        if longest < 1:
            raise ValueError(f"the longest sequence has {longest} tokens; it must have at least 1")
        if not len(corpus):
            raise ValueError("the corpus holds no documents; give some text")
        self.size, self.longest, self.lengths = size, longest, tuple(lengths)
        self.sequences = 0  # drawn, without the one that waits for the next batch
        self._waiting: Place | None = None
        self._counter, self._reader = (TokenReader(corpus, tokenizer, seed) for _ in range(2))
        self._identity = {
            "corpus": corpus.fingerprint(),
            "vocabulary": tokenizer.vocab_size,
            "sequence_length": longest,
            "seed": seed,
            "batch": asdict(size),
            "lengths": list(self.lengths),
        }

    @property
    def epoch(self) -> int:
        """How many times all documents have been read."""
        return self._counter.position.epoch

    def draw(self) -> tuple[Place, ...]:
        """The sequences of the next batch."""
        places: list[Place] = []
        while True:
            place = self._waiting or self._next_place()
            if self.size.full([p.length for p in places], place.length):
                self._waiting = place
                return tuple(places)
            self._waiting = None
            self.sequences += 1
            places.append(place)

    def read(self, place: Place) -> Batch:
        """The tokens of one sequence, as one document, with its labels."""
        self._reader.seek(place.position)
        segments: list[Segment] = []
        left = place.length
        while left:
            segments.append(self._reader.take(left))
            left -= len(segments[-1].tokens)
        return pack(segments, document_masking=False)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values with which a stream over the same corpus draws the next batch."""
        position = self._waiting.position if self._waiting else self._counter.position
        return {
            "version": _STATE_VERSION,
            "kind": "ragged",
            "sequences": self.sequences,
            "position": list(astuple(position)),
            **self._identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises ValueError when it is that of a packed stream, or what the batches depend on has changed.
        """
        if state.get("kind") != "ragged":
            raise ValueError(
                "the data position belongs to a run with packed sequences (batching none), this run has ragged "
                "batches; restore it, or begin a new run"
            )
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"data position of version {state.get('version')}; known is {_STATE_VERSION}")
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise ValueError(
                    f"the data position belongs to {key} {_short(state.get(key))}, this run has {_short(value)}; "
                    "restore it, or begin a new run"
                )
        self.sequences, self._waiting = state["sequences"], None
        self._counter.seek(Position(*state["position"]))

    def _next_place(self) -> Place:
        position = self._counter.position
        if not self.lengths:
            return Place(position, self._counter.count(self.longest))
        length = self.lengths[self.sequences % len(self.lengths)]
        self._counter.skip(length)
        return Place(position, length)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
