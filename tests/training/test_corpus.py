"""Documents come whole, in a fixed order, once each; what cannot be read is named."""

from __future__ import annotations

import json
import sysconfig

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.training.corpus import Corpus, open_corpus
from counterpoint.training.sources import PIECE, JsonLines, text_pieces


def texts(corpus: Corpus) -> list[str]:
    return [corpus.text(i) for i in range(len(corpus))]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_formats_directories_and_globs_give_the_same_documents(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    documents = [f"document {i}\nwith ünïcödé\r\n" for i in range(7)]
    text = tmp_path / "text"
    text.mkdir()
    for i, document in enumerate(documents):
        (text / f"{i}.txt").write_bytes(document.encode())
    (text / "picture.png").write_bytes(b"\xff")
    lines = write_lines(tmp_path / "a.jsonl", [{"text": d} for d in documents])
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet", row_group_size=3)
    for given_paths in ([text], [f"{text}/*.txt"], [lines], [tmp_path / "a.parquet"]):
        assert texts(open_corpus(given_paths)) == documents
    mixed = open_corpus([lines, text / "3.txt", tmp_path / "a.parquet"])
    assert texts(mixed) == [*documents, documents[3], *documents]
    assert mixed.name(1) == f"{lines}:2"
    assert mixed.name(14) == f"{tmp_path / 'a.parquet'}: row 7"
    assert open_corpus([text, f"{text}/*.txt"]).fingerprint() == open_corpus([text]).fingerprint()


def test_default_corpus_is_the_standard_library():
    corpus = open_corpus()
    names = [corpus.name(i) for i in range(len(corpus))]
    assert names == sorted(names, key=lambda n: n.split("/")) and len(set(names)) == len(names)
    assert all(name.startswith(sysconfig.get_path("stdlib")) for name in names)
    assert not any("/test/" in name or "site-packages" in name for name in names)
    dataclasses = next(i for i, name in enumerate(names) if name.endswith("/dataclasses.py"))
    assert "def dataclass(" in corpus.text(dataclasses)
    train, held = corpus.split("train"), corpus.split("validation")
    assert len(held) == len(corpus) // 50
    assert {train.name(i) for i in range(len(train))} | {held.name(i) for i in range(len(held))} == set(names)
    assert len(train) + len(held) == len(corpus)


@pytest.mark.parametrize(("count", "held"), [(2, [1]), (49, [48]), (50, [49]), (151, [49, 99, 149])])
def test_split_holds_out_every_fiftieth(tmp_path, count, held):
    corpus = open_corpus([write_lines(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(count)])])
    assert texts(corpus.split("validation")) == [str(i) for i in held]
    assert texts(corpus.split("train")) == [str(i) for i in range(count) if i not in held]


def test_one_text_file_holds_out_its_end(tmp_path):
    book = "".join(f"line {i} é\n" for i in range(30000))
    (tmp_path / "book.txt").write_text(book)
    corpus = open_corpus([tmp_path / "book.txt"])
    train, held = corpus.split("train").text(0), corpus.split("validation").text(0)
    assert train + held == book
    assert train.endswith("\n") and 0.019 < len(held) / len(book) < 0.021
    assert corpus.split("train").fingerprint() != corpus.split("validation").fingerprint()


def test_what_cannot_be_split(tmp_path):
    (tmp_path / "line.txt").write_text("one line")
    with pytest.raises(ValueError, match=r"line\.txt: the only document is too short"):
        open_corpus([tmp_path / "line.txt"]).split("train")
    with pytest.raises(ValueError, match="one document alone cannot be split"):
        open_corpus([write_lines(tmp_path / "a.jsonl", [{"text": "x"}])]).split("train")


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
)
@settings(max_examples=50)
def test_order_is_a_permutation_that_keeps_groups_together(sizes, seed, epoch):
    class Groups:
        def __len__(self):
            return sum(sizes)

        def groups(self):
            return np.array(sizes)

    corpus = Corpus((Groups(),), np.arange(sum(sizes)))  # pyright: ignore
    order = corpus.order(seed, epoch)
    assert sorted(order) == list(range(sum(sizes)))
    group = np.repeat(np.arange(len(sizes)), sizes)[order]
    assert np.count_nonzero(np.diff(group)) == len(sizes) - 1
    assert np.array_equal(order, corpus.order(seed, epoch))


def test_order_differs_by_epoch_and_seed():
    corpus = open_corpus()
    first = corpus.order(0, 0)
    assert not np.array_equal(first, corpus.order(0, 1))
    assert not np.array_equal(first, corpus.order(1, 0))


@given(st.text(alphabet="ab\n\r é", max_size=50).map(lambda s: s * 5000))
@settings(max_examples=20, deadline=None)
def test_pieces_join_to_the_text(text):
    pieces = list(text_pieces(text))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 2 * PIECE for piece in pieces)


def test_pieces_of_a_file_never_cut_a_character(tmp_path):
    text = "é" * (3 * PIECE) + "\n" + "日本\n" * PIECE
    (tmp_path / "a.txt").write_text("\ufeff" + text, encoding="utf-8")
    pieces = list(open_corpus([tmp_path / "a.txt"]).pieces(0))
    assert "".join(pieces) == text
    assert len(pieces) > 4


def test_half_surrogates_become_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    assert open_corpus([tmp_path / "a.jsonl"]).text(0) == "a\ufffdb \U0001f600"


def test_blank_lines_do_not_count_but_keep_line_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "one"}\n\n\n{"text": "two"}\n{"text": 3}\n')
    source = JsonLines(tmp_path / "a.jsonl", "text")
    assert [source.name(i).rsplit(":", 1)[1] for i in range(3)] == ["2", "5", "6"]
    with pytest.raises(ValueError, match=r"a\.jsonl:6: no text in field 'text'"):
        list(source.pieces(2))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.jsonl", b"\n\n", "holds no documents"),
        ("a.jsonl", b'{"text": "a"', r"a\.jsonl:1: not valid JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: holds a list"),
        ("a.jsonl", b'{"body": "x", "n": 1}\n', "no text in field 'text'; fields with text are: body"),
        ("a.parquet", b"PAR1 not really", "not a parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        open_corpus([tmp_path / name])


def test_text_that_is_not_utf8_is_named_when_read(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8 text"):
        open_corpus([tmp_path / "latin.txt"]).text(0)


def test_missing_paths(tmp_path):
    with pytest.raises(ValueError, match="absent: no such file or directory"):
        open_corpus([tmp_path / "absent"])
    with pytest.raises(ValueError, match="no text found"):
        open_corpus([f"{tmp_path}/*.txt"])
    with pytest.raises(ValueError, match="no text found"):
        open_corpus([tmp_path])
    with pytest.raises(ValueError, match="splits are train and validation"):
        open_corpus().split("test")  # pyright: ignore


def test_parquet_column_errors(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no text column 'text'; text columns are: body"):
        open_corpus([tmp_path / "a.parquet"])
    assert open_corpus([tmp_path / "a.parquet"], field="body").text(0) == "x"


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"pip install 'counterpoint\[data\]'"):
        open_corpus([tmp_path / "a.parquet"])
