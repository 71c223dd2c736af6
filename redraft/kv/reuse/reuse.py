"""The seam of reuse: which parts of a new text are taken over from the cache of another one.

A registered class is a frozen dataclass of hyper-parameters with a `card`, `open(runner)`, which refuses models that it does
not fit, and `spans`. Spans are attached as private copies, keys turned to their new positions; what lies between them is
computed, with all that stands before it as context. From the first span on the text's pages are nobody else's.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, ClassVar, NamedTuple, Protocol

from redraft.card import Card


class Span(NamedTuple):
    """`length` tokens of the new text from position `at` on are those of the old one from `first` on. exact: the tokens before
    them are the same too, so that nothing is approximate."""

    at: int
    first: int
    length: int
    exact: bool


class OpenReuse(Protocol):
    def spans(self, old: Seq[int], new: Seq[int], stored: int) -> list[Span]:
        """In order, not overlapping, of the first len(new) - 1 tokens: at least one must run. The first `stored` tokens of both are
        equal and in the new text's cache already; `old` is what the cache holds of the old text."""
        ...


class Reuse(Protocol):
    """A registered way of reuse: hyper-parameters only."""

    card: ClassVar[Card]

    def open(self, runner: Any) -> OpenReuse: ...
