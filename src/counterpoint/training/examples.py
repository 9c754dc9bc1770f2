"""Lines of jsonl files as examples of an objective: tokens, labels, documents, and values for the loss.

sft     {"prompt": text, "completion": text} or {"messages": [{"role": text, "content": text}, ...]}
dpo     {"prompt": text, "chosen": text, "rejected": text}
grpo    {"prompt": text, "completions": [text, ...], "rewards": [number, ...],
         "old_logprobs": [[number, ...], ...]}, the last one optional: a number per token of each completion

An answer ends with the end mark, which is learned as well. Each answer is a document of its own, its prompt before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from counterpoint.training.packing import IGNORE, Batch
from counterpoint.training.sources import plain_text
from counterpoint.training.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Example:
    """Documents that are trained on together: tokens and labels (S,) int64, values (S,) float32 by name."""

    tokens: np.ndarray
    labels: np.ndarray
    documents: tuple[int, ...]
    values: Mapping[str, np.ndarray] = field(default_factory=dict)


def encode(objective: str, row: Mapping[str, Any], tokenizer: Tokenizer) -> Example:
    """The example in a line. Raises ValueError saying what is wrong with it."""
    if objective == "sft":
        return _answers([_learned(row, tokenizer)])
    prompt = _text(row, "prompt")
    if objective == "dpo":
        texts = [_text(row, "chosen"), _text(row, "rejected")]
        parts = [_prompted(prompt, text, tokenizer) for text in texts]
        return _answers(parts, sign=[np.float32(1), np.float32(-1)])
    texts, rewards = _group(row)
    parts = [_prompted(prompt, text, tokenizer) for text in texts]
    counts = [sum(learned for _, learned in part) for part in parts]
    weights = [np.float32(1 / (len(parts) * n)) for n in counts]
    old = _old_logprobs(row, counts)
    return _answers(parts, advantage=_advantages(rewards), weight=weights, old=old)


def join(examples: Sequence[Example]) -> Batch:
    """The examples end to end, as one sequence."""

    def whole(arrays: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(arrays))[None]

    values = {name: whole([e.values[name] for e in examples]) for name in examples[0].values}
    documents = tuple(n for e in examples for n in e.documents)
    return Batch(whole([e.tokens for e in examples]), whole([e.labels for e in examples]), documents, values)


# ---- documents: lists of (token, whether it is learned) ------------------------------------------------
Document = list[tuple[int, bool]]


def _prompted(prompt: str, completion: str, tokenizer: Tokenizer) -> Document:
    # without a prompt an answer follows the end mark, as after another document
    before = tokenizer.encode(prompt) or [tokenizer.end_of_document]
    answer = [*tokenizer.encode(completion), tokenizer.end_of_document]
    return [*((t, False) for t in before), *((t, True) for t in answer)]


def _learned(row: Mapping[str, Any], tokenizer: Tokenizer) -> Document:
    if "messages" not in row:
        return _prompted(_text(row, "prompt"), _text(row, "completion"), tokenizer)
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of at least one {role, content}")
    document: Document = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{i}] is a {_kind(message)}, expected an object with role and content")
        role, content = (
            _text(message, "role", f"messages[{i}]."),
            _text(message, "content", f"messages[{i}]."),
        )
        learned = role == "assistant"
        document += [(t, False) for t in tokenizer.encode(f"<|{role}|>\n")]
        document += [(t, learned) for t in tokenizer.encode(f"{content}\n")]
        if learned:
            document.append((tokenizer.end_of_document, True))
    if not any(learned for _, learned in document):
        raise ValueError("messages has no assistant message, so there is nothing to learn from")
    return document


def _answers(documents: Sequence[Document], **values: Sequence[Any]) -> Example:
    """Documents with their labels; each value is a number, or one per learned token, for every document."""
    tokens, labels = [], []
    found: dict[str, list[np.ndarray]] = {name: [] for name in values}
    for i, document in enumerate(documents):
        ids = np.array([t for t, _ in document], dtype=np.int64)
        learned = np.array([wanted for _, wanted in document[1:]] + [False])
        tokens.append(ids)
        labels.append(np.where(learned, np.append(ids[1:], IGNORE), IGNORE))
        for name, per_document in values.items():
            row = np.zeros(len(ids), dtype=np.float32)
            row[learned] = per_document[i]
            found[name].append(row)
    return Example(
        np.concatenate(tokens),
        np.concatenate(labels),
        tuple(map(len, documents)),
        {name: np.concatenate(rows) for name, rows in found.items()},
    )


# ---- what a line holds -----------------------------------------------------------------------------------
def _text(row: Mapping[str, Any], key: str, where: str = "") -> str:
    if key not in row:
        there = ", ".join(map(str, row)) or "nothing"
        raise ValueError(f"{where}{key} is missing; the line has {there}")
    if not isinstance(row[key], str):
        raise ValueError(f"{where}{key} is a {_kind(row[key])}, expected a text")
    return plain_text(row[key])


def _group(row: Mapping[str, Any]) -> tuple[list[str], list[float]]:
    texts, rewards = row.get("completions"), row.get("rewards")
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise ValueError("completions must be a list of at least one text")
    if not isinstance(rewards, list) or not _numbers(rewards) or len(rewards) != len(texts):
        raise ValueError(f"rewards must be {len(texts)} finite numbers, one per completion")
    return [plain_text(t) for t in texts], [float(r) for r in rewards]


def _old_logprobs(row: Mapping[str, Any], counts: Sequence[int]) -> list[Any]:
    """Per completion its tokens' log-probabilities, NaN where the line does not tell."""
    old = row.get("old_logprobs")
    if old is None:
        return [math.nan] * len(counts)
    if not isinstance(old, list) or len(old) != len(counts) or not all(map(_numbers, old)):
        raise ValueError(f"old_logprobs must be {len(counts)} lists of finite numbers, one per completion")
    for i, (numbers, count) in enumerate(zip(old, counts, strict=True)):
        if len(numbers) != count:
            raise ValueError(
                f"old_logprobs[{i}] has {len(numbers)} numbers, completions[{i}] has {count} tokens with its end mark"
            )
    return old


def _advantages(rewards: Sequence[float]) -> list[np.float32]:
    """Rewards less their mean, over their standard deviation: what an answer is worth within its group."""
    r = np.array(rewards)
    return list(((r - r.mean()) / (r.std() + 1e-6)).astype(np.float32))


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in value
    )


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "truth value", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
