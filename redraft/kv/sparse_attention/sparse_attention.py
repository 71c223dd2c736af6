"""The interface of sparse attention methods: the cache keeps all keys, and each new row reads some of them.

A registered class is a frozen dataclass of hyper-parameters with a `card` and `open(runner)`, which returns a Select (ops/backend.py)
with a name and limits. Rows of the given context read all keys. For each later row `select` chooses among the keys that the row sees,
by its own query and position, so no choice depends on chunks, drafts or other texts.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from redraft.card import Card
from redraft.ops.backend import Select


class OpenSparseAttention(Select, Protocol):
    """name: the name of its side data, different for different side data; dense_up_to: a row that sees at most this many slots reads all of
    them; sync_every: the number of committed tokens, a multiple of 32, between sync points at which the per-page arrays of full pages are
    filled, 0 for a method without them."""

    name: str
    dense_up_to: int
    sync_every: int


class Read(Protocol):
    """A registered sparse attention method: hyper-parameters only."""

    card: ClassVar[Card]

    def open(self, runner: Any) -> OpenSparseAttention: ...
