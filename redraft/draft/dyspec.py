"""Grows a tree where it is most likely to be accepted: each node of the budget goes to the open place of highest estimate.

Yunfan Xiong, Ruoyu Zhang, Yanzeng Li, Tianhao Wu, Lei Zou: DySpec: Faster Speculative Decoding with Dynamic Token Tree
Structure, 2024, arXiv 2410.11744.

1. A slot is a place for one more child of a node, with its value: the estimated chance that verification comes there and
   accepts. The heap starts with the root's first, of value 1.
2. Take the slot of the highest value v. Draw the node's next child, without replacement; R is the child's probability
   among the tokens left.
3. Open a slot for the child's own first child, of value v R, and one for its next sibling, of value v (1 - R).

Differs: a child's distribution needs a forward of the draft, made for all new nodes when the first of them is wanted; with
threshold > 0 only slots above it are used, level by level, which takes one forward a level (the paper's faster variant).
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
    """Ordered by falling value, then by node: minus the value, the node whose child it would be, which child, and the
    probability that its distribution still holds behind the children before."""

    minus: float
    node: int
    child: int = 0
    left: float = 1.0


@dataclass(frozen=True)
class DySpec(SecondModel):
    """nodes: at most so many, within the engine's budget; threshold: slots of a lower value are not used."""

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
        known = 0  # nodes whose distributions are there
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
