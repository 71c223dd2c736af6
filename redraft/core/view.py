"""Which slots the rows of one sequence see in one step, where that is not all of them. Data for backends."""

from __future__ import annotations

from typing import Any, NamedTuple


class Window(NamedTuple):
    """A row at position p sees keys at positions j < sinks or p - j < recent.

    Where E = p + 1 - sinks - recent > 0 tokens are hidden, the query is rotated to position p - E to score the keys at j < sinks.
    Distances are then those within the cache, and no distance exceeds sinks + recent.
    """

    sinks: int
    recent: int


class Watch(NamedTuple):
    """A requested statistic of the attention weights of a sequence's rows at positions >= since. Let a be the weight that a row
    gives to a slot, averaged over the query heads of a kv head, and t the number of slots that the row sees:

    "mass": a; "low": 1 where a < 1 / t, else 0.
    """

    statistic: str
    since: int = 0


class View(NamedTuple):
    """format, encoded: names of the formats of written pages and of encoded pages (ops/format.py), empty for plain keys and values;
    window: see Window; read: an opened method that selects among the visible keys (Select in ops/backend.py), None where this step
    reads all of them."""

    format: str = ""
    encoded: str = ""
    window: Window | None = None
    read: Any | None = None
