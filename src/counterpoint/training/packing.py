"""Documents packed end to end into sequences of one length, each with its labels and document lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    possibly parts of longer ones. Positions start at 0 in each part.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    documents: tuple[int, ...]


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
