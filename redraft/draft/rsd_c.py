"""Draws a tree from a draft model, siblings without replacement, with a fixed number of children on each level.

Wonseok Jeon, Mukul Gagrani, Raghavv Goel, Junyoung Park, Mingu Lee, Christopher Lott: Recursive Speculative Decoding:
Accelerating LLM Inference via Sampling Without Replacement, 2024, arXiv 2402.14160 (RSD-C).

1. At every node of a level add Gumbel noise to the draft's log-probabilities.
2. Its children are the tokens with the largest sums, in decreasing order: a sample without replacement, in draw order.

Differs: if the budget is short, the last nodes of a level get fewer children or none. At temperature 0 the noise is zero, so the
children are the likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from redraft.card import Card, Guarantee
from redraft.core.tree import Kind
from redraft.draft.second import SecondModel
from redraft.draft.sketch import Sketch
from redraft.errors import InvalidInput


@dataclass(frozen=True)
class RSDC(SecondModel):
    """branching: the number of children of each node, level by level, such as 2x2x2."""

    branching: str = "2x2x2"

    card: ClassVar[Card] = Card(
        "Recursive speculative decoding, constant branching",
        "Jeon, Gagrani, Goel, Park, Lee, Lott, Recursive Speculative Decoding: Accelerating LLM Inference via Sampling Without "
        "Replacement, 2024, arXiv 2402.14160",
        Guarantee.SAME_TEXT,
        needs="a draft model of the same vocabulary",
        deviates="the last nodes of a short budget get fewer children",
        summary="A draft model's tree, fixed branching; with recursive",
    )
    kind: ClassVar[Kind] = Kind.WITHOUT_REPLACEMENT

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(width.isdecimal() and int(width) > 0 for width in self.branching.split("x")):
            raise InvalidInput(f"rsd-c:branching={self.branching}: must be positive numbers joined by x, such as 2x2x2")

    def grow(self, tree: Sketch) -> Iterator[None]:
        level = [-1]
        for depth, width in enumerate(map(int, self.branching.split("x"))):
            if depth:
                yield
            level = [
                tree.add(parent, place)
                for parent in level
                if tree.open(parent)
                for place in tree.distribution(parent).best(min(width, tree.room))  # 1. and 2.
            ]
