"""The stream is the corpus, cut into sequences: the same everywhere, and the same again after a stop."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.training import sources
from counterpoint.training.corpus import open_corpus
from counterpoint.training.data import PackedStream
from counterpoint.training.tokenizer import ByteTokenizer, train_bpe

END = ByteTokenizer.end_of_document


def text_of(i: int) -> str:
    return f"{i}:" + "\n".join(chr(97 + (i * 7 + j) % 26) * (j % 5) for j in range(i * 3 % 40))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    blank = {"text": " \n"}
    rows = [{"text": text_of(i)} if i % 9 else blank for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_corpus([path])


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Documents of a few characters then come in several pieces, as books do."""
    monkeypatch.setattr(sources, "PIECE", 16)


class Counting(ByteTokenizer):
    """A byte tokenizer that counts the characters it was given."""

    def __init__(self):
        self.characters = 0

    def encode(self, text):
        self.characters += len(text)
        return super().encode(text)


def same(a, b):
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels) and a.documents == b.documents


def one_epoch(stream, corpus, seed, epoch):
    """The tokens an epoch must have, by the plainest means."""
    texts = [corpus.text(i) for i in corpus.order(seed, epoch)]
    return [t for text in texts if text.strip() for t in (*text.encode(), END)]


@pytest.mark.parametrize("length", [1, 7, 64, 5000])
def test_every_token_of_two_epochs_once_and_in_order(corpus, length):
    stream = PackedStream(corpus, ByteTokenizer(), length, seed=3)
    expected = one_epoch(stream, corpus, 3, 0) + one_epoch(stream, corpus, 3, 1)
    batches = list(itertools.islice(stream, len(expected) // length))
    tokens = [t for b in batches for t in b.tokens[0].tolist()]
    labels = [t for b in batches for t in b.labels[0].tolist()]
    assert tokens == expected[: len(tokens)]
    assert all(b.tokens.shape == (1, length) and sum(b.documents) == length for b in batches)
    for token, label, following in zip(tokens, labels, expected[1:]):
        assert label == (-100 if token == END else following)
    for b in batches:
        ends = torch.tensor(b.documents).cumsum(0)[:-1] - 1
        assert (b.tokens[0, ends] == END).all()
        assert (b.tokens[0] == END).sum() - (b.tokens[0, -1] == END).int() == len(ends)


def test_whole_documents_are_one_whatever_their_pieces(corpus):
    stream = PackedStream(corpus, ByteTokenizer(), 100_000, seed=0)
    lengths = [len(corpus.text(i).encode()) + 1 for i in corpus.order(0, 0) if corpus.text(i).strip()]
    assert list(next(stream).documents[: len(lengths)]) == lengths


@given(
    before=st.integers(0, 120), skipped=st.integers(0, 120), length=st.integers(1, 90), seed=st.integers(0, 3)
)
@settings(max_examples=60, deadline=None)
def test_skip_and_resume_give_the_same_batches(corpus, before, skipped, length, seed):
    def fresh():
        return PackedStream(corpus, ByteTokenizer(), length, seed)

    straight = fresh()
    expected = list(itertools.islice(straight, before + skipped + 3))[-3:]
    stopped = fresh()
    stopped.skip(before)
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = fresh()
    next(resumed)  # a stream that has moved is put back as well
    resumed.load_state_dict(state)
    resumed.skip(skipped)
    assert all(same(a, b) for a, b in zip(expected, resumed))
    assert resumed.sequences == before + skipped + 3 == straight.sequences
    stopped.skip(skipped)
    assert same(next(stopped), expected[0])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_data_ranks_share_one_global_order(corpus, world_size):
    expected = list(itertools.islice(PackedStream(corpus, ByteTokenizer(), 32, 1), 12))
    for rank in range(world_size):
        stream = PackedStream(corpus, ByteTokenizer(), 32, 1)
        for i in range(12):
            if i % world_size == rank:
                assert same(next(stream), expected[i])
            else:
                stream.skip(1)


def test_only_what_is_needed_is_tokenised(corpus):
    tokenizer = Counting()
    stream = PackedStream(corpus, tokenizer, 64, 0)
    next(stream)
    assert tokenizer.characters <= 64 + 3 * 32, "the first batch reads a sequence and a piece or two"
    stream.skip(400)
    assert stream.epoch >= 2
    tokenizer.characters = 0
    stream.skip(1000)
    assert tokenizer.characters < 64 * 40, "an epoch whose lengths are known is skipped all but unread"
    state, other = stream.state_dict(), Counting()
    resumed = PackedStream(corpus, other, 64, 0)
    resumed.load_state_dict(state)
    assert other.characters <= 64, "resuming tokenises the piece at hand"
    assert same(next(resumed), next(stream))


def test_masking_changes_documents_alone(corpus):
    masked = PackedStream(corpus, ByteTokenizer(), 200, 0)
    plain = PackedStream(corpus, ByteTokenizer(), 200, 0, document_masking=False)
    for a, b in itertools.islice(zip(masked, plain), 5):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels)
        assert b.documents == (200,) and len(a.documents) > 1


def test_bpe_streams_decode_to_the_documents(corpus):
    bpe = train_bpe((corpus.text(i) for i in range(len(corpus))), 300)
    batch = next(PackedStream(corpus, bpe, 400, 5))
    first = corpus.text(next(i for i in corpus.order(5, 0) if corpus.text(i).strip()))
    assert bpe.decode(batch.tokens[0, : batch.documents[0]].tolist()) == first
    assert batch.tokens[0, batch.documents[0] - 1] == bpe.end_of_document


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed 0, this run has 1"),
        ({"sequence_length": 33}, "sequence_length 32, this run has 33"),
        ({"tokenizer": train_bpe(["abc"], 300)}, "vocabulary 257"),
        ({"corpus": "split"}, "corpus .* begin a new run"),
    ],
)
def test_a_state_of_another_stream_is_refused(corpus, change, words):
    given_values = {"corpus": corpus, "tokenizer": ByteTokenizer(), "sequence_length": 32, "seed": 0}
    state = PackedStream(**given_values).state_dict()
    change = {key: corpus.split("train") if value == "split" else value for key, value in change.items()}
    with pytest.raises(ValueError, match=words):
        PackedStream(**{**given_values, **change}).load_state_dict(state)
    with pytest.raises(ValueError, match="version 0"):
        PackedStream(**given_values).load_state_dict({**state, "version": 0})


def test_blank_corpora_and_bad_values_are_refused(tmp_path, corpus):
    (tmp_path / "a.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match="all 1 documents are blank"):
        next(PackedStream(open_corpus([tmp_path / "a.txt"]), ByteTokenizer(), 8, 0))
    with pytest.raises(ValueError, match="sequence_length 0"):
        PackedStream(corpus, ByteTokenizer(), 0, 0)
    with pytest.raises(ValueError, match="only goes forward"):
        PackedStream(corpus, ByteTokenizer(), 8, 0).skip(-1)
