"""An endless, resumable stream of packed sequences: the same on every rank, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from counterpoint.training.corpus import Corpus
from counterpoint.training.packing import Batch, Segment, pack
from counterpoint.training.reader import Position, TokenReader
from counterpoint.training.tokenizer import Tokenizer

_STATE_VERSION = 1


class PackedStream:
    """Iterator over `Batch`: documents in an order shuffled per epoch, cut every sequence_length tokens.

    The batches are a function of corpus, tokenizer, sequence_length and seed alone; data rank d of D takes
    sequence i when i % D == d and skips the others. Text is tokenised when it is reached, and memory is
    bounded by a piece of a document and one sequence. Raises ValueError when sequence_length is below 1,
    the corpus holds no text, or a loaded state belongs to another stream.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        sequence_length: int,
        seed: int,
        document_masking: bool = True,
    ) -> None:
        if sequence_length < 1:
            raise ValueError(f"sequence_length {sequence_length} must be at least 1")
        if seed < 0:
            raise ValueError(f"seed {seed} must not be negative")
        if not len(corpus):
            raise ValueError("the corpus holds no documents; give some text")
        self.sequence_length, self.document_masking = sequence_length, document_masking
        self.sequences = 0
        self._reader = TokenReader(corpus, tokenizer, seed)
        self._identity = {
            "corpus": corpus.fingerprint(),
            "vocabulary": tokenizer.vocab_size,
            "sequence_length": sequence_length,
            "seed": seed,
        }

    @property
    def epoch(self) -> int:
        """How many times all documents have been read."""
        return self._reader.position.epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        segments: list[Segment] = []
        left = self.sequence_length
        while left:
            segments.append(self._reader.take(left))
            left -= len(segments[-1].tokens)
        self.sequences += 1
        return pack(segments, self.document_masking)

    def skip(self, n: int) -> None:
        """Pass over n sequences: documents are tokenised if they never were before, and nothing is packed."""
        if n < 0:
            raise ValueError(f"cannot skip {n} sequences; a stream only goes forward")
        self._reader.skip(n * self.sequence_length)
        self.sequences += n

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values with which a stream over the same corpus goes on here."""
        position = asdict(self._reader.position)
        return {"version": _STATE_VERSION, "sequences": self.sequences, **position, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, at the cost of one piece of text.

        Raises ValueError when corpus, vocabulary, sequence_length or seed are not those of the state.
        """
        if state.get("kind", "packed") != "packed":
            raise ValueError(
                "the data position belongs to a run with ragged batches, this run packs sequences (batching none); "
                "restore it, or begin a new run"
            )
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"data position of version {state.get('version')}; known is {_STATE_VERSION}")
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise ValueError(
                    f"the data position belongs to {key} {state.get(key)}, this run has {value}; "
                    "restore it, or begin a new run"
                )
        self.sequences = state["sequences"]
        self._reader.seek(Position(*(state[key] for key in ("epoch", "turn", "piece", "offset"))))
