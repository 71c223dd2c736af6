"""Proposes nothing. Every step adds one token: this is plain decoding, the baseline of all drafters.

(no paper)

1. An empty tree for every sequence.

Differs: nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, ClassVar

from redraft.card import Card, Guarantee
from redraft.core.plan import Budget
from redraft.core.sequence import Sequence
from redraft.core.tree import EMPTY, TokenTree
from redraft.draft.drafter import Stateless


@dataclass(frozen=True)
class NoDraft(Stateless):
    """Plain decoding."""

    card: ClassVar[Card] = Card("No drafter", "", Guarantee.SAME_TEXT, summary="Drafts nothing; the baseline, and for a full machine")
    never_drafts: ClassVar[bool] = True

    def open(self, runner: Any, sampler: Any) -> NoDraft:
        return self

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        """An empty tree for each sequence."""
        return [EMPTY for _ in seqs]  # 1.
