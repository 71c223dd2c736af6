"""Which slots the rows of one sequence see in one step, where that is not all of them. Data for backends."""

from __future__ import annotations

from typing import Any, NamedTuple


class Window(NamedTuple):
    """A row at position p sees keys at positions j < sinks or p - j < recent. heads: [layer][kv head], whether it holds there; None: in
    all. Rows of other heads see all keys.

    turned: where E = p + 1 - sinks - recent > 0 tokens are hidden, the query is rotated to position p - E to score the keys at j < sinks.
    Distances are then those within the cache, and no distance exceeds sinks + recent.
    """

    sinks: int
    recent: int
    turned: bool = True
    heads: tuple[tuple[bool, ...], ...] | None = None

    @property
    def size(self) -> int:
        """The number of keys that a row sees at most where it holds."""
        return self.sinks + self.recent

    def holds(self, layer: int, head: int) -> bool:
        return self.heads is None or self.heads[layer][head]


class Watch(NamedTuple):
    """A requested statistic of the attention weights of a sequence's rows at positions >= since. Let a be the weight that a row
    gives to a slot, averaged over the query heads of a kv head, m the largest weight that any of these heads gives, and t the number of
    slots that the row sees:

    "mass": a; "low": 1 where a < 1 / t, else 0; "above": 1 where m > threshold / t, else 0.

    heads: [layer][query head], whether it counts; None: all do. The weights of others are 0. each: chain rows are not summed up.
    """

    statistic: str
    since: int = 0
    threshold: float = 1.0
    heads: tuple[tuple[bool, ...], ...] | None = None
    each: bool = False


class Far(NamedTuple):
    """A row at position p scores keys at positions j with p - j >= near as if all of them were `distance` positions before it: keys are
    rotated back by j, and the query is rotated to position `distance`. Layers without rotation score all keys as they are."""

    near: int
    distance: int


class Parallel(NamedTuple):
    """A row at a position behind the last of `spans`, (first, end) each, attends the keys at positions in them as one group. Let s be the
    score of such a key, and L the logarithm of the sum of exp(s / temperature) over those that the row sees. The key then has the score
    s / temperature + (scale * temperature - 1) L."""

    spans: tuple[tuple[int, int], ...]
    temperature: float
    scale: float

    @property
    def end(self) -> int:
        """The first position of rows that it changes."""
        return self.spans[-1][1]

    @property
    def neutral(self) -> bool:
        """Whether it changes no score."""
        return self.temperature == 1 == self.scale


class View(NamedTuple):
    """format, encoded: names of the formats of written pages and of encoded pages (ops/format.py), empty for plain keys and values;
    window: see Window; read: an opened method that selects among the visible keys (Select in ops/backend.py), None where this step reads
    all of them; far: see Far, None if no row has a far key; parallel: see Parallel, None if it changes no row."""

    format: str = ""
    encoded: str = ""
    window: Window | None = None
    read: Any | None = None
    far: Far | None = None
    parallel: Parallel | None = None
