"""Ragged batches of documents: what a batch holds, where it goes on, and what is refused before a run starts."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from counterpoint.planner.batch_solvers.bytescale import bytescale
from counterpoint.training.config import load_config
from counterpoint.training.corpus import open_corpus
from counterpoint.training.data import PackedStream
from counterpoint.training.model import model_config
from counterpoint.training.ragged.lengths import check_batching, read_lengths
from counterpoint.training.ragged.planning import batch_cost
from counterpoint.training.ragged.stream import BatchSize, RaggedStream
from counterpoint.training.tokenizer import ByteTokenizer
from training.runs import write_corpus

LONGEST = 150
SIZE = BatchSize(tokens=500)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return open_corpus([write_corpus(tmp_path_factory.mktemp("stream"))])


def opened(corpus, size=SIZE, lengths=(), seed=0) -> RaggedStream:
    return RaggedStream(corpus, ByteTokenizer(), size, LONGEST, seed, lengths)


def test_an_epoch_holds_every_document_once_cut_at_the_longest_length(corpus):
    stream, found = opened(corpus), []
    while stream.epoch == 0:
        found += [stream.read(place) for place in stream.draw()]
    found += [stream.read(place) for place in stream.draw()]  # the last one may have waited for a batch
    texts = [corpus.text(i).encode() for i in corpus.order(0, 0)]
    pieces = [
        [*text, ByteTokenizer().end_of_document][start : start + LONGEST]
        for text in texts
        for start in range(0, len(text) + 1, LONGEST)
    ]
    assert len(found) >= len(pieces)
    for one, piece in zip(found, pieces):
        assert one.tokens[0].tolist() == piece and one.documents == (len(piece),)
        assert one.labels[0, :-1].tolist() == piece[1:]
    # a piece that goes on predicts its next token; the end of a document predicts nothing
    ends = [int(one.labels[0, -1]) for one in found[: len(pieces)]]
    assert [end == -100 for end in ends] == [piece[-1] == ByteTokenizer().end_of_document for piece in pieces]


def test_batches_are_full_and_go_on_where_a_state_was_taken(corpus):
    straight = opened(corpus)
    batches = [straight.draw() for _ in range(80)]  # more than an epoch
    lengths = [[place.length for place in batch] for batch in batches]
    assert straight.epoch >= 1
    for one, following in itertools.pairwise(lengths):
        assert sum(one) <= 500 < sum(one) + following[0]
    for stop in (1, 7, 70):
        stopped, resumed = opened(corpus), opened(corpus)
        for _ in range(stop):
            stopped.draw()
        resumed.load_state_dict(stopped.state_dict())
        following = resumed.draw()
        assert following == batches[stop]
        assert torch.equal(resumed.read(following[0]).tokens, straight.read(batches[stop][0]).tokens)


def test_lengths_from_a_file_cut_the_text_into_such_sequences(corpus, tmp_path):
    file = tmp_path / "lengths.txt"
    file.write_text("10\n150\n\n3\n")
    lengths = tuple(read_lengths(file).values())
    stream = opened(corpus, BatchSize(sequences=2), lengths)
    drawn = [stream.draw() for _ in range(3)]
    assert [p.length for batch in drawn for p in batch] == [10, 150, 3, 10, 150, 3]
    tokens = torch.cat([stream.read(p).tokens[0] for batch in drawn for p in batch])
    whole = PackedStream(corpus, ByteTokenizer(), 326, 0)
    assert tokens.tolist() == next(whole).tokens[0].tolist()
    state = stream.state_dict()
    resumed = opened(corpus, BatchSize(sequences=2), lengths)
    resumed.load_state_dict(state)
    assert [p.length for p in resumed.draw()] == [10, 150]


def test_a_state_of_another_stream_is_refused(corpus):
    state = opened(corpus).state_dict()
    with pytest.raises(ValueError, match="belongs to batch"):
        opened(corpus, BatchSize(sequences=3)).load_state_dict(state)
    with pytest.raises(ValueError, match="belongs to a run with ragged batches, this run packs"):
        PackedStream(corpus, ByteTokenizer(), LONGEST, 0).load_state_dict(state)
    packed = PackedStream(corpus, ByteTokenizer(), LONGEST, 0).state_dict()
    with pytest.raises(ValueError, match=r"packed sequences \(batching none\), this run has ragged"):
        opened(corpus).load_state_dict(packed)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no lengths"),
        ("5\n0\n", "line 2: '0' is no length"),
        ("5\n-3\n", "line 2: '-3' is no length"),
        ("5\n\n7 8\n", "line 3: '7 8' is no length"),
        ("5\n2000\n", r"line 2: a sequence of 2,000 tokens is longer than data.sequence_length = 1,024"),
        (
            "5\n900\n",
            r"line 2: a sequence of 900 tokens, but 4 processes can hold 800 tokens \(200 each\); shorten it",
        ),
    ],
)
def test_lengths_that_cannot_be_trained_on(tmp_path: Path, text: str, said: str):
    file = tmp_path / "lengths.txt"
    file.write_text(text)
    overrides = [
        "batching=flexsp",
        "parallel.data=4",
        "batching.tokens_per_rank=200",
        f"batching.lengths={file}",
    ]
    with pytest.raises(ValueError, match=said):
        check_batching(load_config(None, overrides), model_config("demo"))


def test_a_sequence_that_needs_offloading_is_let_through_and_a_longer_one_is_not(tmp_path: Path):
    """bytescale moves activations to host memory where the cluster has one; what then fits is what the check says."""
    file = tmp_path / "lengths.txt"
    overrides = [
        "batching=bytescale", "batching.cluster=dgx-a100", "parallel.data=4", "batching.tokens_per_rank=200",
        "data.sequence_length=4000", f"batching.lengths={file}",
    ]  # fmt: skip
    shape = model_config("demo")
    cost = batch_cost(load_config(None, overrides), shape, 4)
    most = 4 * cost.capacity_with(cost.most_offload)
    assert most > 900
    file.write_text(f"5\n{most}\n")
    check_batching(load_config(None, overrides), shape)
    assert bytescale([5, most], cost).lengths == (5, most)
    file.write_text(f"5\n{most + 1}\n")
    said = (
        rf"line 2: a sequence of {most + 1:,} tokens, but 4 processes can hold {most:,} tokens .*offloading"
    )
    with pytest.raises(ValueError, match=said):
        check_batching(load_config(None, overrides), shape)
    with pytest.raises(ValueError, match=r"can hold 800 tokens \(200 each\)"):
        check_batching(load_config(None, [*overrides, "batching.solver=flexsp"]), shape)


def test_batches_are_planned_with_the_strategies_of_the_run():
    config = load_config(
        None, ["model=demo-hybrid", "batching=flexsp", "parallel.linear=states_chain(ahead=true)"]
    )
    cost = batch_cost(config, model_config("demo-hybrid"), 2)
    assert cost.strategies == {"linear_attention": "states_chain(ahead=True)", "full_attention": "ring"}
    assert "changes of layout" in {share.name for share in cost.group(range(2)).shares([500])}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["batching=flex"], "batching.solver = flex: allowed is one of none, static"),
        (["batching=flexsp", "batching.tokens=9", "batching.sequences=9"], "measured in one of them"),
        (["batching.tokens=9"], "batching.solver is none; name a solver"),
        (["batching=static", "parallel.sequence=[2,2]"], "groups of batching = static have one"),
        (["batching=flexsp", "loss.objective=sft"], "takes whole documents; use batching none"),
    ],
)
def test_configurations_that_make_no_sense(overrides: list[str], said: str):
    with pytest.raises(ValueError, match=said):
        load_config(None, overrides)


def test_a_solver_alone_and_a_section_say_the_same():
    short = load_config(None, ["batching=flexsp", "batching.tokens=99"])
    turned = load_config(None, ["batching.tokens=99", "batching.solver=flexsp"])
    assert short == turned and short.batching.tokens == 99 and short.batching.ragged
