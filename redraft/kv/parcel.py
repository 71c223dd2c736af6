"""Where an engine keeps the committed state of a text, so that another engine can take it over. Numbers only; a source has the contents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from redraft.core.sequence import Lanes, Space
from redraft.core.tree import F32, I32

Read = Callable[[Space, I32], Mapping[str, Any]]
"""Copies of the arrays of these pages in another engine's memory, name -> [pages, *shape]. OSError if they cannot be read."""


class Lost(OSError):
    """Pages that arrived are not those that were exported."""


class StoredLane(NamedTuple):
    """length: committed slots; encoded: pages in the format of encoded pages; demoted: leading slots that the eviction policy no longer
    counts; summarized: full pages that were summarised; positions: of the slots, None while slot i holds position i; logs: the logarithms
    of the numbers of tokens that slots stand for, None while all are 0."""

    length: int
    encoded: int = 0
    demoted: int = 0
    summarized: int = 0
    positions: I32 | None = None
    logs: F32 | None = None


class StoredText(NamedTuple):
    """The committed state of an open sequence, valid until it changes. tokens: how many are stored; space, encoded: of its pages and its
    encoded pages; pages, codes: their ids, lane after lane; page_sums, code_sums: CRC-32 of the contents of each, empty if unknown."""

    tokens: int
    space: Space
    encoded: str
    shareable_tokens: int
    lanes: list[StoredLane]
    pages: list[int]
    codes: list[int]
    page_sums: list[int]
    code_sums: list[int]

    def numbers(self) -> dict[str, Any]:
        """As JSON can hold it."""
        lanes = [[part.tolist() if isinstance(part, np.ndarray) else part for part in lane] for lane in self.lanes]
        return {**self._asdict(), "lanes": lanes, "space": list(self.space)}

    @classmethod
    def of(cls, numbers: dict[str, Any]) -> StoredText:
        """What numbers() returned."""
        lanes, kind = numbers["lanes"], numbers["space"]
        found = [
            StoredLane(*rest, *(None if part is None else np.array(part, kind) for part, kind in ((at, np.int32), (logs, np.float32))))
            for *rest, at, logs in lanes
        ]
        return cls(**{**numbers, "lanes": found, "space": Space(Lanes(kind[0]), kind[1])})


class Incoming(NamedTuple):
    """Pages to copy from another memory: src of `space` there to dst here. sums: of their contents, empty if unknown."""

    space: Space
    src: I32
    dst: I32
    sums: list[int]
