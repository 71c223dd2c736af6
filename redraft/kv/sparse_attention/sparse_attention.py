"""The seam of sparse reads: everything is kept, each new row reads a part.

A registered class is a frozen dataclass of hyper-parameters with a `card` and `open(runner)`, whose result is a Select
(ops/backend.py) with a name and limits. Rows of the given context read all; rows behind it read what `select` chooses from
what they see, by their own query and position, so that no choice depends on chunks, drafts or other texts.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from redraft.card import Card
from redraft.ops.backend import Select


class OpenRead(Select, Protocol):
    """name: of its side data, with all that changes them; least: a row that sees no more slots than this reads all; grid: every so
    many committed tokens, a multiple of 32, a sync point at which full pages get their whole arrays, 0 where there are none."""

    name: str
    least: int
    grid: int


class Read(Protocol):
    """A registered read: hyper-parameters only."""

    card: ClassVar[Card]

    def open(self, runner: Any) -> OpenRead: ...
