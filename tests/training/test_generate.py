"""Sampling draws from the model's own distribution and streams whole characters."""

from __future__ import annotations

import time

import pytest
import torch

from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Decoder
from counterpoint.training.generate import _text, generate, sample
from counterpoint.training.tokenizer import ByteTokenizer, train_bpe

BYTES = ByteTokenizer()
CONFIG = ModelConfig.preset("tiny", vocab_size=320, initializer_range=0.3)


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, seed=1)


def causal(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Ids(ByteTokenizer):
    """Shows ids as text, so that a test can read the tokens off the pieces."""

    def encode(self, text):
        return [int(i) for i in text.split()]

    def decode(self, ids):
        return "".join(f" {i}" for i in ids)


def test_greedy_equals_the_model_without_a_cache(model):
    ids = [5, 17, 99]
    got = "".join(generate(model, CONFIG, Ids(), "5 17 99", max_new_tokens=20, temperature=0))
    with torch.inference_mode():
        for _ in range(20):
            logits = model(torch.tensor([ids]), torch.arange(len(ids)), causal)[0, -1]
            ids.append(int(logits[: Ids.vocab_size].argmax()))
    assert 256 not in ids
    assert got == "".join(f" {i}" for i in ids[3:])


def test_the_seed_decides(model):
    def text(seed):
        return "".join(generate(model, CONFIG, BYTES, "ab", max_new_tokens=30, temperature=1.0, seed=seed))

    assert text(1) == text(1) != text(2)


def test_stops_at_the_end_of_a_document_and_at_the_limit(model):
    first = int("".join(generate(model, CONFIG, Ids(), "3", max_new_tokens=1, temperature=0)))

    class Ending(Ids):
        end_of_document = first

    assert list(generate(model, CONFIG, Ending(), "3", max_new_tokens=9, temperature=0)) == []
    assert len(list(generate(model, CONFIG, Ids(), "3", max_new_tokens=4, temperature=0))) == 4
    assert list(generate(model, CONFIG, Ids(), "3", max_new_tokens=0)) == []
    assert list(generate(model, CONFIG, Ids(), "", max_new_tokens=1))


def test_sample_follows_the_probabilities():
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)

    def shares(temperature, top_k=None, top_p=None):
        drawn = [sample(logits, temperature, top_k, top_p, generator) for _ in range(4000)]
        return torch.bincount(torch.tensor(drawn), minlength=4) / len(drawn)

    torch.testing.assert_close(shares(1.0), logits.softmax(0), atol=0.03, rtol=0)
    torch.testing.assert_close(shares(2.0), (logits / 2).softmax(0), atol=0.03, rtol=0)
    only = torch.tensor([-torch.inf, 3.0, 2.0, -torch.inf])
    torch.testing.assert_close(shares(1.0, top_k=2), only.softmax(0), atol=0.03, rtol=0)
    # probabilities sorted: 0.657, 0.242, 0.089, 0.012
    torch.testing.assert_close(shares(1.0, top_p=0.7), only.softmax(0), atol=0.03, rtol=0)
    assert shares(1.0, top_p=0.6)[1] == 1
    assert shares(1.0, top_k=1)[1] == 1
    assert (shares(1.0, top_k=99, top_p=1.0) > 0).all()
    assert sample(logits, 0, None, None, generator) == 1


@pytest.mark.parametrize(
    "text", ["née 日本語 \U0001f600!", "plain", "\U0001f468\u200d\U0001f469", "a\ufffdb"]
)
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_characters_come_whole(text, kind):
    tokenizer = BYTES if kind == "bytes" else train_bpe(["the née"], 262)
    ids = tokenizer.encode(text)
    pieces = list(_text(tokenizer, tokenizer.encode("préfixe é"), iter(ids)))
    assert "".join(pieces) == text
    assert len(ids) > len(pieces) > 1 if text != "plain" else pieces
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_never_completes_is_shown_at_the_end():
    assert list(_text(BYTES, [], iter([97, 0xE6, 0x97]))) == ["a", "\ufffd"]


def test_leading_spaces_of_sentencepiece_tokenizers_survive():
    tokenizers = pytest.importorskip("tokenizers")
    from counterpoint.training.tokenizer import BpeTokenizer

    vocabulary = {"▁a": 0, "▁b": 1, "c": 2, "</s>": 3, "<unk>": 4}
    hub = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    hub.decoder = tokenizers.decoders.Metaspace()
    pieces = list(_text(BpeTokenizer(hub, "</s>"), [0], iter([1, 2, 0])))
    assert "".join(pieces) == " bc a"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"max_new_tokens": -1}, "max_new_tokens -1"),
        ({"max_new_tokens": 4096}, "exceed the model's context of 4096"),
    ],
)
def test_bad_values_are_refused_before_the_first_piece(model, options, words):
    with pytest.raises(ValueError, match=words):
        generate(model, CONFIG, BYTES, "a", **options)


def test_a_vocabulary_the_model_lacks_is_refused(model):
    with pytest.raises(ValueError, match="257 ids, the model 200"):
        generate(model, ModelConfig.preset("tiny", vocab_size=200), BYTES, "a")


def test_two_hundred_tokens_of_the_demo_model_take_seconds():
    config = ModelConfig.preset("demo", vocab_size=257)
    began = time.monotonic()
    text = "".join(generate(Decoder(config), config, Ids(), "1 2 3", max_new_tokens=200))
    assert text.count(" ") > 100
    assert time.monotonic() - began < 10
