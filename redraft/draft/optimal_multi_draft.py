"""The children of a node are the draft's likeliest tokens and one random token. An optimal verification rule is known for them.

Zhengmian Hu, Tong Zheng, Vignesh Viswanathan, Ziyi Chen, Ryan A. Rossi, Yihan Wu, Dinesh Manocha, Heng Huang: Towards
Optimal Multi-draft Speculative Decoding, 2025, arXiv 2502.18779 (greedy drafting).

1. The first `children` - 1 children of a node are the likeliest tokens of the draft, in order.
2. The last child is drawn from the draft distribution over the remaining tokens.

Differs: the paper studies one node. Here every node of `depth` levels gets its children in this way. If the budget is short,
the last nodes of a level get fewer children or none.
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
class OptimalMultiDraft(SecondModel):
    """children: children of each node; depth: levels."""

    children: int = number(2, ge=1)
    depth: int = number(3, ge=1)

    card: ClassVar[Card] = Card(
        "Optimal multi-draft, greedy drafting",
        "Hu, Zheng, Viswanathan, Chen, Rossi, Wu, Manocha, Huang, Towards Optimal Multi-draft Speculative Decoding, 2025, arXiv 2502.18779",
        Guarantee.SAME_TEXT,
        needs="a draft model of the same vocabulary",
        deviates="a tree of several levels; the last nodes of a short budget get fewer children",
        summary="Top tokens and a random one; with greedy-multi-draft",
    )
    kind: ClassVar[Kind] = Kind.TOP_PLUS_ONE

    def grow(self, tree: Sketch) -> Iterator[None]:
        level = [-1]
        for depth in range(self.depth):
            if depth:
                yield
            above, level = level, []
            for parent in above:
                if tree.open(parent) and (children := min(self.children, tree.room)):
                    distribution = tree.distribution(parent)
                    likeliest = distribution.likeliest(children - 1)  # 1.
                    rest = [place for place in distribution.best(children) if place not in likeliest][:1]  # 2.
                    level += [tree.add(parent, place) for place in (*likeliest, *rest)]
