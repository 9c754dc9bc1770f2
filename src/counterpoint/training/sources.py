"""Where documents lie: text files, jsonl lines, parquet rows. Each is indexed at once and read when asked.

A document comes as pieces of text, so that a book of a gigabyte costs no more memory than a page: about
`PIECE` characters each, cut at a line break where there is one. The pieces joined are the document.
"""

from __future__ import annotations

import codecs
import io
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

PIECE = 1 << 16


class Source(Protocol):
    """Some documents; `groups` are the numbers of neighbours that are read together, in order."""

    def __len__(self) -> int: ...
    def pieces(self, i: int) -> Iterator[str]: ...
    def name(self, i: int) -> str: ...
    def groups(self) -> np.ndarray: ...
    def identity(self) -> list[tuple[str, int]]: ...


@dataclass(frozen=True, slots=True)
class TextRange:
    """The bytes from `start` to `stop` of a text file, cut at line breaks."""

    path: Path
    start: int
    stop: int


class TextFiles:
    """Text files in UTF-8, each one document."""

    def __init__(self, ranges: Sequence[TextRange]) -> None:
        self.ranges = ranges

    @classmethod
    def whole(cls, paths: Sequence[Path]) -> TextFiles:
        return cls([TextRange(path, 0, path.stat().st_size) for path in paths])

    def __len__(self) -> int:
        return len(self.ranges)

    def name(self, i: int) -> str:
        return str(self.ranges[i].path)

    def groups(self) -> np.ndarray:
        return np.ones(len(self), dtype=np.int64)

    def identity(self) -> list[tuple[str, int]]:
        return [(r.path.name, r.stop - r.start) for r in self.ranges]

    def pieces(self, i: int) -> Iterator[str]:
        r = self.ranges[i]
        decoder = codecs.getincrementaldecoder("utf-8")()
        with open(r.path, "rb") as file:
            file.seek(r.start)
            while data := file.read(min(PIECE, r.stop - file.tell())):
                data += file.readline(min(PIECE, r.stop - file.tell()))
                last = file.tell() >= r.stop
                try:
                    text = decoder.decode(data, final=last)
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{r.path}: not UTF-8 text ({error.reason}); convert it or leave it out"
                    ) from None
                if file.tell() == r.start + len(data):
                    text = text.removeprefix("\ufeff") if r.start == 0 else text
                if text:
                    yield text

    def cut(self, share: int) -> tuple[TextFiles, TextFiles]:
        """All but the last `share`-th of a single file, and that part; ValueError when no line ends there."""
        (r,) = self.ranges
        with open(r.path, "rb") as file:
            file.seek(r.start + (r.stop - r.start) * (share - 1) // share)
            file.readline()
            middle = file.tell()
        if not r.start < middle < r.stop:
            raise ValueError(
                f"{r.path}: the only document is too short to hold out a part of it; add lines or documents"
            )
        return TextFiles([TextRange(r.path, r.start, middle)]), TextFiles([TextRange(r.path, middle, r.stop)])


class JsonLines:
    """A file with one JSON object per line, each one document: the text in `field`, all its texts for None."""

    def __init__(self, path: Path, field: str | None) -> None:
        self.path, self.field = path, field
        self.starts = array("Q")
        position = 0
        with open(path, "rb") as file:
            for line in file:
                if not line.isspace():
                    self.starts.append(position)
                position += len(line)
        if len(self) and field is not None:
            self._text(0)  # a wrong field shows now, not in the middle of a run

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, i: int) -> dict[str, Any]:
        """The object of document i; ValueError naming file and line when there is none."""
        with open(self.path, "rb") as file:
            file.seek(self.starts[i])
            line = file.readline()
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.name(i)}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            wanted = "" if self.field is None else f" with {self.field!r}"
            raise ValueError(f"{self.name(i)}: holds a {type(row).__name__}, expected an object{wanted}")
        return row

    def name(self, i: int) -> str:
        with open(self.path, "rb") as file:
            before, line = self.starts[i], 1
            while before and (data := file.read(min(before, 1 << 20))):
                line, before = line + data.count(b"\n"), before - len(data)
        return f"{self.path}:{line}"

    def groups(self) -> np.ndarray:
        return np.ones(len(self), dtype=np.int64)

    def identity(self) -> list[tuple[str, int]]:
        return [(self.path.name, self.path.stat().st_size)]

    def pieces(self, i: int) -> Iterator[str]:
        yield from text_pieces(self._text(i))

    def _text(self, i: int) -> str:
        row = self.row(i)
        if self.field is None:
            return "\n".join(map(plain_text, _texts(row)))
        if not isinstance(row.get(self.field), str):
            keys = ", ".join(key for key, value in row.items() if isinstance(value, str)) or "none"
            raise ValueError(f"{self.name(i)}: no text in field {self.field!r}; fields with text are: {keys}")
        return plain_text(row[self.field])


def plain_text(text: str) -> str:
    """Text of a JSON file that any tokenizer takes: JSON can spell half of a surrogate pair."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _texts(value: Any) -> Iterator[str]:
    """All texts inside a JSON value, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


class Parquet:
    """A parquet file, each row one document: the text in `field`. Rows of a row group are read together."""

    def __init__(self, path: Path, field: str) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise ValueError(
                f"{path}: parquet files need pyarrow; pip install 'counterpoint[data]'"
            ) from None
        self.path, self.field = path, field
        try:
            self.file: Any = pq.ParquetFile(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from None
        columns = {column.name: column.type for column in self.file.schema_arrow}
        texts = [
            name
            for name, kind in columns.items()
            if pa.types.is_string(kind) or pa.types.is_large_string(kind)
        ]
        if field not in texts:
            raise ValueError(
                f"{path}: no text column {field!r}; text columns are: {', '.join(texts) or 'none'}"
            )
        rows = [self.file.metadata.row_group(g).num_rows for g in range(self.file.metadata.num_row_groups)]
        self.starts = np.concatenate(([0], np.cumsum(rows, dtype=np.int64))).astype(np.int64)
        self.cached: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def name(self, i: int) -> str:
        return f"{self.path}: row {i + 1}"

    def groups(self) -> np.ndarray:
        return np.diff(self.starts)

    def identity(self) -> list[tuple[str, int]]:
        return [(self.path.name, self.path.stat().st_size)]

    def pieces(self, i: int) -> Iterator[str]:
        group = int(np.searchsorted(self.starts, i, side="right")) - 1
        if self.cached[0] != group:
            self.cached = (group, self.file.read_row_group(group, columns=[self.field]).column(0))
        yield from text_pieces(self.cached[1][i - int(self.starts[group])].as_py() or "")


def text_pieces(text: str) -> Iterator[str]:
    """The text in pieces, cut at line breaks where there are any."""
    stream = io.StringIO(text, newline="")
    while piece := stream.read(PIECE):
        yield piece + stream.readline(PIECE)
