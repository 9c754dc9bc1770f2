"""Tokenizers lose nothing, are the same every time, and mean the same to transformers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.training.corpus import open_corpus
from counterpoint.training.tokenizer import (
    END,
    BpeTokenizer,
    ByteTokenizer,
    load_tokenizer,
    open_tokenizer,
    train_bpe,
)

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "the cat sat on the mat, the end. é 日本\n" * 20]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 290)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return ByteTokenizer() if request.param == "bytes" else bpe


@given(text=st.text(max_size=80))
@settings(max_examples=100)
def test_lossless_on_any_text(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.end_of_document for i in ids)


def test_text_that_spells_the_end_mark_stays_text(tokenizer):
    ids = tokenizer.encode(f"a{END}b")
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode(ids) == f"a{END}b"
    assert tokenizer.decode([*ids, tokenizer.end_of_document]) == f"a{END}b"


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert type(again) is type(tokenizer)
    assert (again.vocab_size, again.end_of_document) == (tokenizer.vocab_size, tokenizer.end_of_document)
    for text in (*TEXTS, f"{END} x", "  \t\n"):
        assert again.encode(text) == tokenizer.encode(text)


def test_transformers_reads_it(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    for kind in (transformers.PreTrainedTokenizerFast, transformers.AutoTokenizer):
        theirs = kind.from_pretrained(tmp_path)
        assert theirs.eos_token_id == tokenizer.end_of_document
        assert len(theirs) == tokenizer.vocab_size
        for text in (*TEXTS, "naïve \U0001f600 tabs\t\tand  spaces , kept ."):
            assert theirs(text)["input_ids"] == tokenizer.encode(text)
            assert theirs.decode(tokenizer.encode(text)) == text


def test_training_is_deterministic_and_merges(bpe):
    assert train_bpe(TEXTS, 290).hub.to_str() == bpe.hub.to_str()
    assert bpe.vocab_size == 290
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) * 0.6


def test_little_text_gives_a_smaller_vocabulary():
    small = train_bpe(["ab"], 300)
    assert 257 <= small.vocab_size < 300
    with pytest.raises(ValueError, match="need 257"):
        train_bpe(["ab"], 256)


def test_a_run_keeps_its_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("some words some words\n" * 50)
    corpus, run = open_corpus([tmp_path / "a.txt"]), tmp_path / "run"
    first = open_tokenizer("bpe", corpus, run, 270)
    assert sorted(p.name for p in run.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    (tmp_path / "a.txt").write_text("other letters entirely\n" * 50)
    again = open_tokenizer("bpe", open_corpus([tmp_path / "a.txt"]), run, 270)
    assert again.encode("some words") == first.encode("some words")
    with pytest.raises(ValueError, match=r"made as .*270.*asks for .*280"):
        open_tokenizer("bpe", corpus, run, 280)
    with pytest.raises(ValueError, match="use another directory"):
        open_tokenizer("bytes", corpus, run)
    copied = open_tokenizer(str(run / "tokenizer.json"), corpus, tmp_path / "other")
    assert copied.encode("some words") == first.encode("some words")


def test_end_of_a_foreign_tokenizer(bpe, tmp_path):
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path / "tokenizer.json").end_of_document == bpe.end_of_document
    assert load_tokenizer(tmp_path, end_of_document="a").end_of_document == bpe.hub.token_to_id("a")
    renamed = (tmp_path / "tokenizer.json").read_text().replace(END, "<|stop|>")
    (tmp_path / "tokenizer.json").write_text(renamed)
    with pytest.raises(ValueError, match="cannot tell which token ends a document"):
        load_tokenizer(tmp_path)
    for eos in ("<|stop|>", {"content": "<|stop|>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        loaded = load_tokenizer(tmp_path)
        assert isinstance(loaded, BpeTokenizer) and loaded.end == "<|stop|>"


@pytest.mark.parametrize(("content", "words"), [(None, "no such file"), ("{}", "not a tokenizer.json")])
def test_bad_files_are_named(tmp_path, content, words):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: {words}"):
        load_tokenizer(tmp_path)
