"""What a simulation records of each request, in columns."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from math import nan
from typing import Any, NamedTuple

import numpy as np

from redraft.core.tree import F64, I64


class Record(NamedTuple):
    """One request that ended or was refused. Times are seconds from the start of the simulation; nan: it was refused. number: in order of
    arrival; worker: where it ended, -1 if it was refused; prompt, output: tokens; cached: prompt tokens that were found in the prefix cache
    at first admission; first, second, end: when its first, second and last token were drawn, nan without a second one; longest: the
    longest time between two of its tokens, 0 for a single one."""

    number: int
    arrived: float
    worker: int = -1
    prompt: int = 0
    output: int = 0
    cached: int = 0
    first: float = nan
    second: float = nan
    end: float = nan
    longest: float = nan


INTEGERS = ("number", "worker", "prompt", "output", "cached")


class Records:
    """Columns of records in order of their end, and the times between tokens of all of them."""

    fields = Record._fields

    def __init__(self) -> None:
        self._columns: list[Any] = [array("q" if name in INTEGERS else "d") for name in Record._fields]
        self.gaps: list[tuple[F64, I64]] = []  # times between two tokens of a text, and how many there were of each

    def __len__(self) -> int:
        return len(self._columns[0])

    def add(self, record: Record) -> None:
        for column, value in zip(self._columns, record, strict=True):
            column.append(value)

    def column(self, name: str) -> Any:
        """A copy of the values of one field, as an array."""
        return np.array(self._columns[Record._fields.index(name)])

    def __iter__(self) -> Iterator[Record]:
        return map(Record._make, zip(*self._columns, strict=True))
