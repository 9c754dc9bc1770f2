"""Documents packed end to end into sequences of one length, each with its labels and document lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of one document inside a sequence; `following` is the document's next token, None at its end."""

    tokens: np.ndarray
    following: int | None


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed sequence of S tokens.

    tokens (1, S) int64; labels (1, S) int64, the next token of the same document and -100 at its end, so
    already shifted; documents: lengths of the documents in order, which sum to S, the first and last of them
    possibly parts of longer ones. Positions start at 0 in each part. values: what a loss needs beside the
    labels, (1, S) float32 by name.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    documents: tuple[int, ...]
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def padded(self, length: int) -> Batch:
        """At least `length` tokens: what is missing is a document of its own, without labels."""
        missing = length - self.tokens.shape[1]
        if missing <= 0:
            return self

        def longer(x: torch.Tensor, fill: float) -> torch.Tensor:
            return torch.cat([x, x.new_full((1, missing), fill)], dim=1)

        values = {name: longer(x, 0.0) for name, x in self.values.items()}
        tokens, labels = longer(self.tokens, 0), longer(self.labels, IGNORE)
        return Batch(tokens, labels, (*self.documents, missing), values)


def pack(segments: Sequence[Segment], document_masking: bool = True) -> Batch:
    """The segments as one sequence; without masking the whole sequence counts as one document.

    A document's last token (its end mark) never predicts the next document's first, masked or not; a
    document that goes on in the next sequence predicts its next token all the same.
    """
    assert segments and all(len(s.tokens) for s in segments)
    tokens = np.concatenate([s.tokens for s in segments]).astype(np.int64)
    labels = np.empty_like(tokens)
    labels[:-1] = tokens[1:]
    ends = np.cumsum([len(s.tokens) for s in segments]) - 1
    labels[ends] = [IGNORE if s.following is None else s.following for s in segments]
    lengths = tuple(len(s.tokens) for s in segments) if document_masking else (len(tokens),)
    return Batch(torch.from_numpy(tokens)[None], torch.from_numpy(labels)[None], lengths)
