"""The training text: named documents, a held-out split by a hash of the text, and packed rows of token ids."""

from __future__ import annotations

import hashlib
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

SEPARATOR = "<|endoftext|>"
"""The line between two documents of a text file."""

SKIPPED_FOLDERS = {"__pycache__", "_bundled", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
"""Left out: tests, bundled wheels, installed packages and generated tables."""

LONGEST_FILE = 160_000
"""Bytes. A longer file of the standard library would be too large a part of a small corpus."""


@dataclass(frozen=True)
class Document:
    """One text. `source` is `stdlib` or `peps`."""

    source: str
    name: str
    text: str


def standard_library(folder: Path | None = None) -> list[Document]:
    """The running interpreter's standard library (or the one in `folder`), without tests and generated tables."""
    folder = folder or Path(sysconfig.get_path("stdlib"))
    if not folder.is_dir():
        raise FileNotFoundError(f"no standard library at {folder}")
    documents = []
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if SKIPPED_FOLDERS.isdisjoint(name.parts) and 0 < path.stat().st_size <= LONGEST_FILE:
            with tokenize.open(path) as file:  # decodes by the coding line of the file
                documents.append(Document("stdlib", name.as_posix(), file.read()))
    if not documents:
        raise ValueError(f"no Python source in {folder}")
    return documents


def separated_file(path: Path, source: str) -> list[Document]:
    """The documents of a text file (`.txt`, or `.zst` of one), separated by lines `<|endoftext|>`."""
    if not path.is_file():
        raise FileNotFoundError(f"no corpus file at {path}")
    data = path.read_bytes()
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise ImportError(f"{path} needs `pip install zstandard`; or unpack it and name the .txt") from error
        data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    text = data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    parts = (part.strip("\n") for part in text.split(f"{SEPARATOR}\n"))
    return [Document(source, f"{path.name}#{i}", text + "\n") for i, text in enumerate(parts) if text]


def split(documents: list[Document], held_out: float = 0.02) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents. The hash of a text decides, so equal texts are never on both sides."""
    training: list[Document] = []
    held: list[Document] = []
    for document in documents:
        digest = hashlib.sha256(document.text.encode()).digest()
        (held if int.from_bytes(digest[:8], "big") < held_out * 2**64 else training).append(document)
    return training, held


def encode(documents: list[Document], tokenizer: Tokenizer) -> dict[str, list[np.ndarray]]:
    """Source -> its documents as uint16 ids, each `<s> text </s>` (the tokenizer adds `<s>`)."""
    end = tokenizer.token_to_id("</s>")
    encodings = tokenizer.encode_batch([document.text for document in documents])
    encoded: dict[str, list[np.ndarray]] = {}
    for document, encoding in zip(documents, encodings, strict=True):
        encoded.setdefault(document.source, []).append(np.array([*encoding.ids, end], dtype=np.uint16))
    return encoded


class Mixture:
    """An endless stream per source, each epoch shuffled anew, cut into rows that mix the sources by `shares`.

    Rows are a function of the seed and of the sequence of `rows` calls alone: a resumed run repeats the calls.
    """

    def __init__(self, encoded: dict[str, list[np.ndarray]], shares: dict[str, float], seed: int) -> None:
        missing = [source for source in shares if not encoded.get(source)]
        if missing:
            raise ValueError(f"no training documents of {missing}")
        self.encoded, self.shares = encoded, shares
        self.random = np.random.default_rng(seed)
        self.left = {source: np.empty(0, dtype=np.uint16) for source in shares}

    def take(self, source: str, length: int) -> np.ndarray:
        """The next `length` ids of a source."""
        documents, pieces, have = self.encoded[source], [self.left[source]], len(self.left[source])
        while have < length:
            epoch = [documents[i] for i in self.random.permutation(len(documents))]
            pieces += epoch
            have += sum(map(len, epoch))
        stream = np.concatenate(pieces)
        self.left[source] = stream[length:]
        return stream[:length]

    def rows(self, count: int, context: int) -> np.ndarray:
        """(about `count`, context + 1) ids in random order: a row's inputs are `[:-1]`, its targets `[1:]`."""
        blocks = [windows(self.take(source, round(count * share) * context + 1), context) for source, share in self.shares.items()]
        rows = np.concatenate(blocks)
        return rows[self.random.permutation(len(rows))]


def windows(stream: np.ndarray, context: int) -> np.ndarray:
    """Cut a stream into (n, context + 1) rows, each one's last id being the next one's first."""
    count = (len(stream) - 1) // context
    return np.stack([stream[i * context : (i + 1) * context + 1] for i in range(count)])
