"""Grows a draft model's tree: each new node goes to the free place with the highest estimated chance of acceptance.

Yunfan Xiong, Ruoyu Zhang, Yanzeng Li, Tianhao Wu, Lei Zou: DySpec: Faster Speculative Decoding with Dynamic Token Tree
Structure, 2024, arXiv 2410.11744.

1. A slot is a place for one more child of a node. Its value is the estimated probability that verification reaches this
   place and accepts the child. The heap starts with one slot at the root, of value 1.
2. Take the slot with the highest value v. Draw the node's next child without replacement. R is the child's probability
   among the remaining tokens.
3. Add a slot for the first child of the new node, with value v R, and a slot for its next sibling, with value v (1 - R).

Differs: a child's distribution needs a forward pass of the draft model. One pass covers all new nodes, and it runs when the
first of their distributions is needed. With threshold > 0, slots below the threshold are not used and the tree grows level by
level, with one forward pass a level (the paper's faster variant).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.tree import Kind
from redraft.draft.second import SecondModel
from redraft.draft.sketch import Sketch
from redraft.options import number


class Slot(NamedTuple):
    """Ordered by decreasing value, then by node. minus: the negative value; node: the parent; child: the child's number; left:
    the probability that remains in the parent's distribution without the earlier children."""

    minus: float
    node: int
    child: int = 0
    left: float = 1.0


@dataclass(frozen=True)
class DySpec(SecondModel):
    """nodes: the most nodes, within the engine's budget; threshold: slots with a lower value are not used."""

    nodes: int = number(64, ge=1)
    threshold: float = number(0.0, ge=0, lt=1)

    card: ClassVar[Card] = Card(
        "DySpec",
        "Xiong, Zhang, Li, Wu, Zou, DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure, 2024, arXiv 2410.11744",
        Guarantee.SAME_TEXT,
        needs="a draft model of the same vocabulary",
        deviates="forwards of the draft are made for all new nodes at once",
        summary="A draft model's tree by confidence; GPUs with spare time",
    )
    kind: ClassVar[Kind] = Kind.WITHOUT_REPLACEMENT

    def grow(self, tree: Sketch) -> Iterator[None]:
        heap, later = [Slot(-1.0, -1)], list[Slot]()  # 1.
        known = 0  # the first `known` nodes have known distributions
        room = min(self.nodes, tree.room)
        while room and (heap or later):
            if not heap:  # with a threshold: the level is done
                yield
                known, heap, later = len(tree.tokens), later, []
                heapq.heapify(heap)
            slot = heapq.heappop(heap)  # 2.
            if not tree.open(slot.node) or -slot.minus < self.threshold:
                continue
            if slot.node >= known:
                yield
                known = len(tree.tokens)
            distribution = tree.distribution(slot.node)
            place = distribution.nth(slot.child)
            if place is None:
                continue
            q = float(np.exp(distribution.logq[place]))
            chance = min(1.0, q / slot.left) if slot.left > 0 else 1.0
            child = tree.add(slot.node, place)
            room -= 1
            deeper = Slot(slot.minus * chance, child)  # 3.
            if self.threshold:
                later.append(deeper)
            else:
                heapq.heappush(heap, deeper)
            heapq.heappush(heap, Slot(slot.minus * (1 - chance), slot.node, slot.child + 1, slot.left - q))
