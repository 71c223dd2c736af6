"""The seam of verifiers: which path of each tree the target agrees with, and the bonus token behind it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import ClassVar, Protocol

from redraft.card import Card
from redraft.core.law import Law
from redraft.core.plan import Accepted
from redraft.core.tree import Kind, TokenTree


class Verifier(Protocol):
    """A frozen dataclass. `undoes`: the kinds of children whose making it undoes without bias."""

    card: ClassVar[Card]
    undoes: ClassVar[frozenset[Kind]]

    def accept(self, trees: Seq[TokenTree], law: Law) -> list[Accepted]:
        """One Accepted per sequence; empty where law.roots is -1 (an unfinished chunk draws nothing)."""
        ...
