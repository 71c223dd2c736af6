"""The interface of reuse methods: they choose which parts of a new text come from the cache of another text.

A registered class is a frozen dataclass of hyper-parameters with a `card` and `open(runner)`, which raises Unsupported for models
that the method does not fit. The opened method has `spans`. Spans are attached as private copies with keys rotated to their new
positions. The text between spans is computed with all text before it as context. From the first span on, pages are not shared.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, ClassVar, NamedTuple, Protocol

from redraft.card import Card


class Span(NamedTuple):
    """`length` tokens of the new text from position `at` on equal those of the old text from `first` on. exact: the tokens before
    them are equal too, so reuse is exact."""

    at: int
    first: int
    length: int
    exact: bool


class OpenReuse(Protocol):
    def spans(self, old: Seq[int], new: Seq[int], stored: int) -> list[Span]:
        """The spans to reuse, in order and without overlap, within the first len(new) - 1 tokens, because at least one must run. The
        first `stored` tokens of both texts are equal and already in the cache of the new text. `old` is the cached part of the old
        text."""
        ...


class Reuse(Protocol):
    """A registered reuse method: hyper-parameters only."""

    card: ClassVar[Card]

    def open(self, runner: Any) -> OpenReuse: ...
