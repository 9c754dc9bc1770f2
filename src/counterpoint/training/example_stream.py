"""An endless, resumable stream of sequences made of examples: the counterpart of `PackedStream` for fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from counterpoint.training.corpus import Corpus
from counterpoint.training.examples import Example, encode, join
from counterpoint.training.packing import Batch
from counterpoint.training.tokenizer import Tokenizer

_STATE_VERSION = 1


class ExampleStream:
    """Iterator over `Batch`: examples in an order shuffled per epoch, whole ones, up to sequence_length tokens.

    A sequence of sft holds as many examples as fit, one of dpo a pair, one of grpo a group. The sequences are a
    function of corpus, tokenizer, objective, sequence_length and seed alone. Raises ValueError, naming file and line,
    when a line is reached that is no example or longer than sequence_length; `check` reaches all of them.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, objective: str, sequence_length: int, seed: int
    ) -> None:
        if not len(corpus):
            raise ValueError("the corpus holds no examples; give some")
        self.corpus, self.tokenizer, self.objective = corpus, tokenizer, objective
        self.sequence_length, self.seed, self.sequences = sequence_length, seed, 0
        self._lengths: dict[int, int] = {}
        self._identity = {
            "corpus": corpus.fingerprint(),
            "vocabulary": tokenizer.vocab_size,
            "objective": objective,
            "sequence_length": sequence_length,
            "seed": seed,
        }
        self._seek(0, 0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.sequences += 1
        return join([self._example(i) for i in self._take()])

    def skip(self, n: int) -> None:
        """Pass over n sequences; a line is read again only for the length it is not known by yet."""
        for _ in range(n):
            self._take()
        self.sequences += n

    def check(self) -> None:
        """Read every line once; ValueError for the first that is no example, naming file and line."""
        for i in range(len(self.corpus)):
            self._length(i)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values with which a stream over the same corpus goes on here."""
        place = {"epoch": self._epoch, "turn": self._turn}
        return {"version": _STATE_VERSION, "sequences": self.sequences, **place, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; ValueError when it belongs to other data, or to pretraining."""
        for key, value in {"version": _STATE_VERSION, **self._identity}.items():
            if state.get(key) != value:
                raise ValueError(
                    f"the data position belongs to {key} {state.get(key)}, this run has {value}; "
                    "restore it, or begin a new run"
                )
        self.sequences = state["sequences"]
        self._seek(state["epoch"], state["turn"])

    def _seek(self, epoch: int, turn: int) -> None:
        self._epoch, self._turn = epoch, turn
        self._order = self.corpus.order(self.seed, epoch)

    def _take(self) -> list[int]:
        """The examples of the next sequence; an epoch's last sequence may be short."""
        if self._turn == len(self._order):
            self._seek(self._epoch + 1, 0)
        chosen, room = [], self.sequence_length
        while self._turn < len(self._order):
            i = int(self._order[self._turn])
            length = self._length(i)
            if length > room or (chosen and self.objective != "sft"):
                break
            chosen.append(i)
            room -= length
            self._turn += 1
        return chosen

    def _length(self, i: int) -> int:
        if i not in self._lengths:
            self._lengths[i] = len(self._example(i).tokens)
        return self._lengths[i]

    def _example(self, i: int) -> Example:
        row = self.corpus.row(i)
        try:
            example = encode(self.objective, row, self.tokenizer)
        except ValueError as error:
            raise ValueError(f"{self.corpus.name(i)}: {error}") from None
        if len(example.tokens) > self.sequence_length:
            raise ValueError(
                f"{self.corpus.name(i)}: {len(example.tokens)} tokens exceed data.sequence_length = "
                f"{self.sequence_length}; raise it or drop the line"
            )
        return example
