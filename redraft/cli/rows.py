"""Files of prompts and of results, in JSON lines. A file of prompts is read in pieces, in any order. parquet.py has the other form."""

from __future__ import annotations

import hashlib
import json
import sys
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from redraft.errors import InvalidInput, RedraftError, Unsupported, shown

PARQUET = ".parquet"
CHUNK = 1 << 20  # bytes of a file that are read at once


class Prompts(Protocol):
    """A file of prompts. It can be pickled. word: what errors call a row; first: the number that they give the first one; ids: the Arrow
    type of the ids."""

    word: str
    first: int
    count: int
    ids: str

    def lines(self, start: int, stop: int) -> list[bytes]:
        """JSON for each of the rows, 0 the first, or what a damaged file has in its place."""
        ...

    def digest(self) -> str:
        """Differs for other content."""
        ...


class Results(Protocol):
    """A file of results that is being written. RedraftError if that fails."""

    def write(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def prompts(path: Path, fields: Iterable[str]) -> Prompts:
    """fields: the columns that a table may have. InvalidInput if the file cannot be read."""
    with readable(path):
        if path.suffix == PARQUET or path.is_dir():
            return _parquet().TablePrompts(path, fields)  # type: ignore[no-any-return]
        return LinePrompts(path)


def results(path: Path | None, ids: str = "string") -> Results:
    """A new file, in the form that its name says; None: stdout."""
    with written():
        if path is not None and path.suffix == PARQUET:
            return _parquet().TableResults(path, ids)  # type: ignore[no-any-return]
        return LineResults(path)


def complete(path: Path) -> tuple[int, int] | None:
    """The number of rows of a file of results, and of those with an error; None if it does not end as `close` ends it."""
    try:
        if path.suffix == PARQUET:
            return _parquet().complete(path)  # type: ignore[no-any-return]
        found = [json.loads(line) for line in path.read_bytes().splitlines()]
        return len(found), sum(row["error"] is not None for row in found)
    except (OSError, ValueError):
        return None


def _parquet() -> Any:
    try:
        from redraft.cli import parquet
    except ImportError:
        raise Unsupported("a Parquet file needs pyarrow, which is not installed: pip install 'redraft[cluster]'") from None
    return parquet


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """The file of prompts is read in the block."""
    try:
        yield
    except OSError as error:
        raise InvalidInput(f"--prompts = {path}: {error.strerror or shown(error)}") from None


@contextmanager
def written() -> Iterator[None]:
    """Results are written in the block."""
    try:
        yield
    except OSError as error:
        raise RedraftError(f"the results cannot be written: {error.strerror or shown(error)}") from None


def content(files: Iterable[Path]) -> str:
    """A digest of what the files hold."""
    found = hashlib.sha256()
    for path in files:
        with readable(path), path.open("rb") as file:
            while part := file.read(CHUNK):
                found.update(part)
    return found.hexdigest()


class LinePrompts:
    word, first, ids = "line", 1, "string"

    def __init__(self, path: Path) -> None:
        self.path, self.ends = path, array("Q", [0])  # where each line begins, and the last one ends
        with path.open("rb") as file:
            for line in file:
                self.ends.append(self.ends[-1] + len(line))
        self.count = len(self.ends) - 1

    def lines(self, start: int, stop: int) -> list[bytes]:
        with readable(self.path), self.path.open("rb") as file:
            file.seek(self.ends[start])
            return [file.read(self.ends[i + 1] - self.ends[i]) for i in range(start, min(stop, self.count))]

    def digest(self) -> str:
        return content([self.path])


class LineResults:
    """Each row is in the file at once, so that a run that is stopped keeps it."""

    def __init__(self, path: Path | None) -> None:
        self.file = sys.stdout if path is None else path.open("w", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        with written():
            self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.file.flush()

    def close(self) -> None:
        if self.file is not sys.stdout:
            with written():
                self.file.close()
