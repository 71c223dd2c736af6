"""Files of prompts and of results as tables, in Parquet. It needs pyarrow."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from redraft.cli.rows import PARQUET, content, readable, written
from redraft.errors import InvalidInput, did_you_mean, shown

GROUP = 1024  # rows of results that are written together
USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")


class TablePrompts:
    """A file, or a folder of files, in the order of their names. A null is a field that is not given."""

    word, first = "row", 0

    def __init__(self, path: Path, fields: Iterable[str]) -> None:
        self.files = sorted(path.glob(f"*{PARQUET}")) if path.is_dir() else [path]
        if not self.files:
            raise InvalidInput(f"--prompts = {path}: is a folder without {PARQUET} files")
        self.groups: list[tuple[Path, int]] = []  # a file and the number of one of its row groups
        sizes = [0]
        for file in self.files:
            opened = _open(file)
            for name in opened.schema_arrow.names:
                if name not in fields:
                    raise InvalidInput(f"--prompts = {file}: unknown column {name!r}: {did_you_mean(name, fields)}")
            self.groups += [(file, group) for group in range(opened.num_row_groups)]
            sizes += [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
        schema = _open(self.files[0]).schema_arrow
        whole = "id" in schema.names and pa.types.is_integer(schema.field("id").type)
        self.ids = "int64" if whole else "string"
        self.ends = list(accumulate(sizes))
        self.count = self.ends[-1]
        self.read: tuple[int, pa.Table] | None = None  # the last row group, which may be many times as long as what is asked for

    def lines(self, start: int, stop: int) -> list[bytes]:
        return list(self._rows(start, min(stop, self.count)))

    def _rows(self, start: int, stop: int) -> Iterator[bytes]:
        while start < stop:
            place = bisect_right(self.ends, start) - 1
            until = min(stop, self.ends[place + 1])
            for row in self._group(place).slice(start - self.ends[place], until - start).to_pylist(maps_as_pydicts="strict"):
                yield _line(row)
            start = until

    def _group(self, place: int) -> pa.Table:
        if self.read is None or self.read[0] != place:
            file, group = self.groups[place]
            with readable(file):
                self.read = place, _open(file).read_row_group(group)
        return self.read[1]

    def digest(self) -> str:
        return content(self.files)


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise InvalidInput(f"--prompts = {file}: not Parquet: {shown(error)}") from None


def _line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(_given(row)).encode()
    except TypeError as error:  # a type without a form in JSON
        return f"not JSON: {error}".encode()


def _given(value: Any) -> Any:
    """Without nulls: a struct of a table has all the fields that any row has."""
    if isinstance(value, dict):
        return {name: _given(item) for name, item in value.items() if item is not None}
    return [_given(item) for item in value] if isinstance(value, list) else value


def complete(file: Path) -> tuple[int, int]:
    """As rows.complete; ValueError if the file has no end."""
    errors = pq.read_table(file, columns=["error"]).column("error")
    return len(errors), len(errors) - errors.null_count


class TableResults:
    """Rows are written in groups. The file can be read after `close`."""

    def __init__(self, path: Path, ids: str) -> None:
        usage = pa.struct([(name, pa.int64()) for name in USAGE])
        kinds = {
            "index": pa.int64(), "id": pa.int64() if ids == "int64" else pa.string(), "text": pa.string(),
            "token_ids": pa.list_(pa.int64()), "finish_reason": pa.string(), "usage": usage, "seed": pa.uint64(), "error": pa.string(),
        }  # fmt: skip
        self.schema = pa.schema(list(kinds.items()))
        self.writer = pq.ParquetWriter(path, self.schema)
        self.rows: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any]) -> None:
        if pa.types.is_string(self.schema.field("id").type) and row["id"] is not None:
            row = {**row, "id": str(row["id"])}
        self.rows.append(row)
        if len(self.rows) == GROUP:
            self._flush()

    def close(self) -> None:
        if self.rows:
            self._flush()
        with written():
            self.writer.close()

    def _flush(self) -> None:
        with written():
            self.writer.write_table(pa.Table.from_pylist(self.rows, self.schema))
        self.rows = []
