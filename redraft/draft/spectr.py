"""Draws several independent continuations from a draft model and merges equal prefixes into a tree.

Ziteng Sun, Ananda Theertha Suresh, Jae Hun Ro, Ahmad Beirami, Himanshu Jain, Felix Yu: SpecTr: Fast Speculative Decoding
via Optimal Transport, 2023, arXiv 2310.15141.

1. Draw `drafts` sequences of `length` tokens, each token from the draft distribution after the sequence so far.
2. Merge them into a tree. A token drawn twice at a node is one node but counts as two draws in the verification rules.

Differs: at temperature 0 all sequences are the same chain. If the budget is short, there are fewer or shorter drafts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from redraft.card import Card, Guarantee
from redraft.core.tree import Kind
from redraft.draft.second import SecondModel
from redraft.draft.sketch import Sketch
from redraft.options import number


@dataclass(frozen=True)
class SpecTr(SecondModel):
    """drafts: sequences; length: tokens of each."""

    drafts: int = number(4, ge=1)
    length: int = number(4, ge=1)

    card: ClassVar[Card] = Card(
        "SpecTr",
        "Sun, Suresh, Ro, Beirami, Jain, Yu, SpecTr: Fast Speculative Decoding via Optimal Transport, 2023, arXiv 2310.15141",
        Guarantee.SAME_TEXT,
        needs="a draft model of the same vocabulary",
        deviates="fewer drafts where the node budget is short",
        summary="Several sampled continuations; with k-seq",
    )
    kind: ClassVar[Kind] = Kind.IID

    def grow(self, tree: Sketch) -> Iterator[None]:
        drafts = min(self.drafts, tree.room)  # fixed before any draw, because no draw may decide which nodes are kept
        length = min(self.length, tree.room // max(1, drafts))
        at = [-1] * drafts
        for level in range(length):
            if level:
                yield
            for node in dict.fromkeys(at):  # 2.
                members = [d for d, own in enumerate(at) if own == node]
                if tree.open(node) and len(tree.distribution(node).ids):
                    for d, place in zip(members, tree.distribution(node).samples(members), strict=True):  # 1.
                        at[d] = tree.add(node, place)
