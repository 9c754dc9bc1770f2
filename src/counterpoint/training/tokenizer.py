"""Text to token ids and back: bytes, a byte-pair encoding trained here, or any tokenizer.json."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as HubTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from counterpoint.training.corpus import Corpus

END = "<|endoftext|>"
_KNOWN_ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
_TRAINING_CHARACTERS = 20_000_000  # more text hardly moves the merges of vocabularies of this size


class Tokenizer(Protocol):
    """What training and sampling need; ids are below `vocab_size`, `end_of_document` closes a document."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_document(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def save(self, directory: str | Path) -> None: ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, and 256 at a document's end."""

    vocab_size = 257
    end_of_document = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, directory: str | Path) -> None:
        """Write it as a byte-level BPE without merges, which is what it is to transformers."""
        hub = HubTokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
        _byte_level(hub)
        hub.add_special_tokens([END])
        _write(hub, END, Path(directory))


class BpeTokenizer:
    """A tokenizer of the `tokenizers` library; text that spells a special token stays text."""

    def __init__(self, hub: HubTokenizer, end: str) -> None:
        end_id = hub.token_to_id(end)
        if end_id is None:
            raise ValueError(
                f"the tokenizer has no token {end!r} to end documents with; name one that it has"
            )
        self.hub, self.end, self.end_of_document = hub, end, end_id
        self.vocab_size = max(hub.get_vocab(with_added_tokens=True).values()) + 1
        hub.encode_special_tokens = True
        hub.no_truncation()
        hub.no_padding()

    def encode(self, text: str) -> list[int]:
        return self.hub.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.hub.decode(ids, skip_special_tokens=True)

    def save(self, directory: str | Path) -> None:
        _write(self.hub, self.end, Path(directory))


def train_bpe(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
    """A byte-level BPE of at most `vocab_size` ids learnt from `texts`; the same texts give the same merges.

    Lossless on any text: the 256 bytes are in the vocabulary and nothing is normalised. Raises ValueError
    when vocab_size has no room for them.
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocabulary of {vocab_size} is too small; 256 bytes and the end of a document need 257"
        )
    hub = HubTokenizer(models.BPE())
    _byte_level(hub)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # pyright: ignore[reportCallIssue]
    hub.train_from_iterator(texts, trainer)
    return BpeTokenizer(hub, END)


def load_tokenizer(path: str | Path, end_of_document: str | None = None) -> Tokenizer:
    """The tokenizer in a tokenizer.json or in a directory that holds one (any model type of `tokenizers`).

    The token that ends a document is `end_of_document`, or else the eos_token of the tokenizer_config.json
    beside it, or else a common name for it. Raises ValueError when there is no file, when it cannot be read,
    or when no such token is known.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: no such file; give bytes, bpe, or a tokenizer.json")
    try:
        hub = HubTokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{file}: not a tokenizer.json ({error})") from None
    if hub.get_vocab(with_added_tokens=True) == {**_byte_vocabulary(), END: 256} and not _merges(hub):
        return ByteTokenizer()
    end = end_of_document or _settings(file.parent).get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    end = end or next((name for name in _KNOWN_ENDS if hub.token_to_id(name) is not None), None)
    if end is None:
        raise ValueError(
            f"{file}: cannot tell which token ends a document; put eos_token in tokenizer_config.json"
        )
    try:
        return BpeTokenizer(hub, end)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def open_tokenizer(kind: str, corpus: Corpus, directory: str | Path, vocab_size: int = 4096) -> Tokenizer:
    """The tokenizer a run asks for: "bytes", "bpe" (trained on the corpus), or the path of a tokenizer.json.

    It is kept in `directory`, and the one kept there is taken when the run comes back. Raises ValueError when
    the directory holds a tokenizer made for another kind or vocabulary, and as `load_tokenizer` does.
    """
    directory = Path(directory)
    wanted = {"kind": kind, "vocab_size": vocab_size} if kind == "bpe" else {"kind": kind}
    if (directory / "tokenizer.json").is_file():
        made = _settings(directory).get("made_as")
        if made != wanted:
            raise ValueError(
                f"{directory} holds a tokenizer made as {made}, this run asks for {wanted}; "
                "use another directory"
            )
        return load_tokenizer(directory)
    if kind == "bytes":
        tokenizer: Tokenizer = ByteTokenizer()
    elif kind == "bpe":
        tokenizer = train_bpe(_sample(corpus), vocab_size)
    else:
        tokenizer = load_tokenizer(kind)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".tokenizer.") as temporary:
        tokenizer.save(temporary)
        # tokenizer.json comes last: where it lies, the settings that say how it was made lie too
        _write_settings(directory, {**_settings(Path(temporary)), "made_as": wanted})
        os.replace(Path(temporary) / "tokenizer.json", directory / "tokenizer.json")
    return tokenizer


def _sample(corpus: Corpus) -> Iterator[str]:
    """Documents in a fixed shuffled order, up to the number of characters that training reads."""
    left = _TRAINING_CHARACTERS
    for i in corpus.order(seed=0, epoch=0):
        for piece in corpus.pieces(int(i)):
            yield piece
            left -= len(piece)
            if left <= 0:
                return


def _byte_level(hub: HubTokenizer) -> None:
    hub.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    hub.decoder = decoders.ByteLevel()  # pyright: ignore


def _byte_vocabulary() -> dict[str, int]:
    """Byte-level BPE's printable stand-in of each byte: itself where printable, else moved behind 255."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = iter(range(256, 512))
    return {chr(b if b in printable else next(moved)): b for b in range(256)}


def _merges(hub: HubTokenizer) -> list[Any]:
    return json.loads(hub.to_str())["model"].get("merges", [])


def _settings(directory: Path) -> dict[str, Any]:
    file = directory / "tokenizer_config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None


def _write(hub: HubTokenizer, end: str, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    _write_settings(directory, settings)
    _replace(directory / "tokenizer.json", hub.to_str(pretty=True))


def _write_settings(directory: Path, settings: dict[str, Any]) -> None:
    _replace(directory / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def _replace(file: Path, content: str) -> None:
    """Write the file whole or not at all."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(content)
        os.chmod(name, 0o644)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
