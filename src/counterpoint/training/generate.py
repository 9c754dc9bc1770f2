"""Sampling from a decoder in one process, token by token with cached keys and values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from counterpoint.model.cache import KeyValueCache
from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Decoder
from counterpoint.training.tokenizer import Tokenizer


def generate(
    model: Decoder,
    config: ModelConfig,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """The continuation of `prompt` in pieces of text, each as soon as its characters are complete.

    temperature 0 takes the likeliest token; top_k keeps the k likeliest, top_p the fewest whose probabilities
    sum to at least p (both after the temperature). Ends at a document's end or after max_new_tokens. An empty
    prompt starts from the end-of-document token, as after another document. Raises ValueError (now, not at
    the first piece) on values out of range, a vocabulary that the model lacks, and more tokens than it takes.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens {max_new_tokens} must not be negative")
    if not temperature >= 0:
        raise ValueError(f"temperature {temperature} must be 0 (greedy) or above")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must be above 0 and at most 1")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}; "
            "use the model's own tokenizer"
        )
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_document]
    if len(ids) + max_new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{config.max_position_embeddings}; shorten the prompt or ask for fewer"
        )
    tokens = _tokens(model, config, tokenizer, ids, max_new_tokens, temperature, top_k, top_p, seed)
    return _text(tokenizer, ids, tokens)


def _tokens(
    model: Decoder,
    config: ModelConfig,
    tokenizer: Tokenizer,
    ids: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> Iterator[int]:
    device = model.lm_head.weight.device
    generator = torch.Generator().manual_seed(seed)
    cache = KeyValueCache(config, len(ids) + max_new_tokens)
    new, start = torch.tensor([ids], device=device), 0
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            positions = torch.arange(start, start + new.shape[1], device=device)
            hidden = model.model(new, positions, cache.attends)[:, -1]
            logits = model.lm_head(hidden)[0, : tokenizer.vocab_size].float().cpu()
            token = sample(logits, temperature, top_k, top_p, generator)
        if token == tokenizer.end_of_document:
            return
        yield token
        start += new.shape[1]
        new = torch.tensor([[token]], device=device)


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> int:
    """One id drawn from logits (V,) float32; see `generate` for the other arguments."""
    if temperature == 0:
        return int(logits.argmax())
    ordered, ids = torch.softmax(logits / temperature, dim=-1).sort(descending=True, stable=True)
    keep = len(ids) if top_k is None else min(top_k, len(ids))
    if top_p is not None:
        # the first token is kept even when it alone exceeds p
        keep = min(keep, 1 + int((ordered.cumsum(0)[:-1] < top_p).sum()))
    return int(ids[torch.multinomial(ordered[:keep], 1, generator=generator)])


def _text(tokenizer: Tokenizer, prompt: list[int], tokens: Iterator[int]) -> Iterator[str]:
    """Text as it completes: a character of several tokens waits for its last one.

    What is new is the difference of two decodings that begin at the same token, since some tokenizers treat
    the first token of a text differently (SentencePiece drops its space).
    """
    ids, begin, done = prompt[-8:], 0, len(prompt[-8:])
    for token in tokens:
        ids.append(token)
        known, text = tokenizer.decode(ids[begin:done]), tokenizer.decode(ids[begin:])
        if len(text) > len(known) and not text.endswith("\ufffd"):
            yield text[len(known) :]
            begin, done = done, len(ids)
    rest = tokenizer.decode(ids[begin:])[len(tokenizer.decode(ids[begin:done])) :]
    if rest:
        yield rest
