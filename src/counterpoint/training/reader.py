"""The tokens of a corpus in an order shuffled per epoch, with a position that can be left and found again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from counterpoint.training.corpus import Corpus
from counterpoint.training.packing import Segment
from counterpoint.training.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Position:
    """The next token: `offset` in piece `piece` of the document that comes as number `turn` of `epoch`."""

    epoch: int = 0
    turn: int = 0
    piece: int = 0
    offset: int = 0


class TokenReader:
    """Documents one after the other, tokenised piece by piece when reached, each closed by its end mark.

    A piece is tokenised on its own, so a document of any size takes the memory of a piece. Blank documents
    are passed over. Raises ValueError when the corpus holds no text at all.
    """

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, seed: int) -> None:
        self.corpus, self.tokenizer, self.seed = corpus, tokenizer, seed
        self.lengths: dict[
            int, int
        ] = {}  # tokens of the documents seen, so that they need not be read again to be counted
        self._begin_epoch(0)
        self._begin_document(0)

    @property
    def position(self) -> Position:
        return Position(self._epoch, self._turn, self._piece, self._offset)

    def seek(self, position: Position) -> None:
        """Go to a position that was read from a reader of the same corpus, tokenizer and seed."""
        if position == self.position:
            return
        if position.epoch != self._epoch:
            self._begin_epoch(position.epoch)
        self._begin_document(position.turn)
        if position.piece or position.offset:
            self._open(position.piece)
            self._offset = position.offset

    def take(self, limit: int) -> Segment:
        """At least one and up to `limit` tokens of one document; at its end, on to the next document."""
        self._find_text()
        parts: list[np.ndarray] = []
        while True:
            part = self._buffer[self._offset : self._offset + limit]
            parts.append(part)
            self._offset += len(part)
            limit -= len(part)
            if self._offset == len(self._buffer):
                if self._ahead is None:
                    self._end_document()
                    return Segment(np.concatenate(parts), None)
                self._load_piece()
            if limit == 0:
                return Segment(np.concatenate(parts), int(self._buffer[self._offset]))

    def count(self, limit: int) -> int:
        """Pass over what `take` would give, and say how many tokens that is; documents seen before are not read."""
        self._skip_blank()
        known = self.lengths.get(self._document) if len(self._buffer) == 0 else None
        if known is None or known > limit:
            return len(self.take(limit).tokens)
        self._begin_document(self._turn + 1)
        return known

    def skip(self, tokens: int) -> None:
        """Pass over tokens; documents whose length is known from before are not read."""
        while tokens:
            tokens -= self.count(tokens)

    # ---- the document at hand: not opened yet while the buffer is empty ------------------------
    @property
    def _document(self) -> int:
        return int(self._order[self._turn])

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch, self._order = epoch, self.corpus.order(self.seed, epoch)

    def _begin_document(self, turn: int) -> None:
        if turn == len(self._order):
            self._begin_epoch(self._epoch + 1)
            turn = 0
        self._turn, self._piece, self._offset = turn, 0, 0
        self._pieces: Iterator[str] = iter(())
        self._ahead: str | None = None
        self._buffer = np.empty(0, dtype=np.int32)
        self._before: int | None = 0

    def _open(self, piece: int) -> None:
        """Tokenise this piece of the document; those before it are read but not tokenised."""
        self._pieces = self.corpus.pieces(self._document)
        for _ in range(piece):
            next(self._pieces)
        self._ahead = next(self._pieces, None)
        self._piece = piece - 1
        self._before = 0 if piece == 0 else None
        self._load_piece()

    def _load_piece(self) -> None:
        text, self._ahead = self._ahead, next(self._pieces, None)
        if self._before is not None:
            self._before += len(self._buffer)
        ids = self.tokenizer.encode(text or "")
        if self._ahead is None:
            ids.append(self.tokenizer.end_of_document)
        self._buffer, self._offset = np.array(ids, dtype=np.int32), 0
        self._piece += 1
        if not ids:  # a tokenizer may drop a piece of blanks altogether
            self._load_piece()

    def _skip_blank(self) -> None:
        """Pass over documents that are known to be blank."""
        for _ in range(len(self._order)):
            if len(self._buffer) or self.lengths.get(self._document) != 0:
                return
            self._begin_document(self._turn + 1)

    def _find_text(self) -> None:
        """Open the document at hand, or the next one that has text."""
        for _ in range(len(self._order) + 1):
            if len(self._buffer):
                return
            first = next(self.corpus.pieces(self._document), "")
            if first.isspace() or not first:
                self.lengths[self._document] = 0
                self._begin_document(self._turn + 1)
            else:
                self._open(0)
        raise ValueError(f"all {len(self._order)} documents are blank; give some with text")

    def _end_document(self) -> None:
        if self._before is not None:
            self.lengths[self._document] = self._before + len(self._buffer)
        self._begin_document(self._turn + 1)
