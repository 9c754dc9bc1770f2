"""Documents to train on: from files the user names, or the Python standard library's own sources."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import itertools
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from counterpoint.training.sources import JsonLines, Parquet, Source, TextFiles

HELD_OUT = 50  # every 50th document is for validation
_JSON = {".jsonl", ".ndjson", ".json"}
_PARQUET = {".parquet"}
_TEXT = {".txt", ".text", ".md", ".rst", ".py"}
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents with an index; `chosen` are the documents of this split, in the order of the sources."""

    sources: tuple[Source, ...]
    chosen: np.ndarray
    _stops: np.ndarray = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_stops", np.cumsum([len(source) for source in self.sources]))

    def __len__(self) -> int:
        return len(self.chosen)

    def pieces(self, i: int) -> Iterator[str]:
        """The text of document i in pieces; ValueError naming file and line when it cannot be read."""
        source, j = self._locate(i)
        return source.pieces(j)

    def text(self, i: int) -> str:
        """The whole text of document i."""
        return "".join(self.pieces(i))

    def row(self, i: int) -> dict[str, Any]:
        """The JSON object of document i of a corpus of `open_rows`."""
        source, j = self._locate(i)
        assert isinstance(source, JsonLines)
        return source.row(j)

    def name(self, i: int) -> str:
        """File, and line or row, of document i."""
        source, j = self._locate(i)
        return source.name(j)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Documents 0..len-1 as they come in an epoch: groups that are read together stay together.

        The groups and the documents within each are shuffled by (seed, epoch).
        """
        rng = np.random.default_rng((seed, epoch))
        sizes = np.concatenate([source.groups() for source in self.sources])
        group = np.repeat(np.arange(len(sizes)), sizes)[self.chosen]
        place = rng.permutation(len(sizes))
        return np.lexsort((rng.random(len(group)), place[group]))

    def split(self, name: Literal["train", "validation"]) -> Corpus:
        """The documents to train on, or those held out: every 50th, and the last when there are fewer.

        A corpus of one text file holds out its last 50th. ValueError when there is nothing to hold out.
        """
        if name not in ("train", "validation"):
            raise ValueError(f"split {name!r} is not known; splits are train and validation")
        if len(self) == 1:
            source, j = self._locate(0)
            if not isinstance(source, TextFiles):
                raise ValueError(f"{self.name(0)}: one document alone cannot be split; add documents")
            train, held = TextFiles([source.ranges[j]]).cut(HELD_OUT)
            return Corpus((train if name == "train" else held,), np.arange(1))
        number = np.arange(len(self))
        held = number % HELD_OUT == HELD_OUT - 1 if len(self) >= HELD_OUT else number == len(self) - 1
        return Corpus(self.sources, self.chosen[held if name == "validation" else ~held])

    def fingerprint(self) -> str:
        """A digest of the files' names and sizes and of the split: what a resumed run must find again."""
        digest = hashlib.sha256()
        for source in self.sources:
            digest.update(repr(source.identity()).encode())
        digest.update(self.chosen.tobytes())
        return digest.hexdigest()[:16]

    def _locate(self, i: int) -> tuple[Source, int]:
        j = int(self.chosen[i])
        number = int(np.searchsorted(self._stops, j, side="right"))
        return self.sources[number], j - (int(self._stops[number - 1]) if number else 0)


def open_corpus(paths: Sequence[str | Path] = (), field: str = "text") -> Corpus:
    """All documents of the given files, directories and globs; of the standard library when none is given.

    Text files are documents as a whole, jsonl lines and parquet rows one each, their text in `field`.
    Directories are searched for .txt, .text, .md, .rst, .py, .jsonl, .ndjson, .json and .parquet files; a
    file named outright, or matched by a glob, may have any suffix. Only the index is made now; text is read
    when it is asked for. Raises ValueError for a path that does not exist, an empty file, no text at all, a
    first jsonl line or a parquet file that lacks the field, and parquet without pyarrow.
    """
    files = list(dict.fromkeys(itertools.chain.from_iterable(map(_files, paths)))) if paths else _library()
    sources: list[Source] = []
    for is_text, run in itertools.groupby(files, key=lambda f: f.suffix.lower() not in _JSON | _PARQUET):
        if is_text:
            sources.append(TextFiles.whole(list(run)))
            continue
        for file in run:
            source = (JsonLines if file.suffix.lower() in _JSON else Parquet)(file, field)
            if not len(source):
                raise ValueError(f"{file}: holds no documents; fill it or leave it out")
            sources.append(source)
    total = sum(len(source) for source in sources)
    if not total:
        raise ValueError(
            f"no text in {', '.join(map(str, paths))}; name files, or directories with {_suffixes()}"
        )
    return Corpus(tuple(sources), np.arange(total))


def open_rows(paths: Sequence[str | Path]) -> Corpus:
    """All lines of the given jsonl files, directories and globs, as JSON objects; see `Corpus.row`.

    Raises ValueError when no path is given, one does not exist, is empty, or is not a jsonl file.
    """
    if not paths:
        raise ValueError("data.paths is empty; name jsonl files in the format of loss.objective")
    sources = []
    for file in dict.fromkeys(itertools.chain.from_iterable(map(_files, paths))):
        if file.suffix.lower() not in _JSON:
            raise ValueError(f"{file}: not a jsonl file; examples are one JSON object per line (.jsonl)")
        sources.append(JsonLines(file, None))
    total = sum(len(source) for source in sources)
    if total < 2:
        raise ValueError(f"{', '.join(map(str, paths))}: {total} examples; give two, one of them is held out")
    return Corpus(tuple(sources), np.arange(total))


def _files(given: str | Path) -> list[Path]:
    path = Path(given).expanduser()
    if path.is_file():
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: the file is empty; fill it or leave it out")
        return [path]
    if path.is_dir():
        found = (p for p in path.rglob("*") if p.suffix.lower() in _JSON | _PARQUET | _TEXT)
    elif glob.has_magic(str(path)):
        found = (Path(p) for p in glob.glob(str(path), recursive=True))
    else:
        raise ValueError(f"{path}: no such file or directory; give text, jsonl or parquet files")
    files = sorted(p for p in found if p.is_file() and p.stat().st_size)
    if not files:
        raise ValueError(f"{path}: no text found; name files, or directories with {_suffixes()} files")
    return files


def _suffixes() -> str:
    return ", ".join(sorted(_TEXT | _JSON | _PARQUET))


def _library() -> list[Path]:
    """The standard library's sources without its tests, sorted by name, those that are UTF-8 text."""
    root = Path(sysconfig.get_path("stdlib"))
    found = (p for p in root.rglob("*.py") if _NOT_LIBRARY.isdisjoint(p.relative_to(root).parts))
    files = sorted((p for p in found if p.stat().st_size and _is_utf8(p)), key=lambda p: p.relative_to(root))
    if not files:
        raise ValueError(f"{root}: this Python comes without its library's sources; name text files instead")
    return files


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True
