"""How the rows of one sequence see its slots in one step, where that is not simply all of them. Data for backends."""

from __future__ import annotations

from typing import Any, NamedTuple


class Window(NamedTuple):
    """A row at position p sees keys at positions j < sinks or p - j < recent.

    Where E = p + 1 - sinks - recent of the text's tokens are out of sight, a key at j < sinks is scored with the query turned
    to position p - E, so that distances are those within the cache: what is in use never exceeds sinks + recent.
    """

    sinks: int
    recent: int


class Watch(NamedTuple):
    """A statistic of attention weights wanted of a sequence's rows at positions >= since. With a the weight that a row gives
    to a slot, averaged over the query heads of a kv head, and t the number of slots that it sees:

    "mass": a; "low": 1 where a < 1 / t, else 0.
    """

    statistic: str
    since: int = 0


class View(NamedTuple):
    """format, coded: names of the formats of the pages that are written and of those that were encoded (ops/format.py), empty
    for keys and values as they are; window: see Window; read: an opened method that chooses among the visible keys (Select in
    ops/backend.py), where it is in force in this step."""

    format: str = ""
    coded: str = ""
    window: Window | None = None
    read: Any | None = None
