"""How a drafter offers single tokens, so that a planner can merge what several drafters know about one place.

A place is what a drafter needs to continue a path of drafted tokens: of one kind per drafter, opaque to others. An offer is a token and a
bucket: the number of the class of evidence for it, below `buckets`. How often offers of a bucket come true is for the planner to learn.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq
from math import log
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from redraft.core.plan import Budget
from redraft.core.sequence import Sequence
from redraft.core.tree import TokenTree
from redraft.draft.drafter import OpenDrafter

Offer = tuple[int, int]
"""A token and the bucket of its evidence."""


@runtime_checkable
class Source(Protocol):
    """Optional members of an opened drafter."""

    @property
    def buckets(self) -> int:
        """Classes of evidence."""
        ...

    def start(self, seq: Sequence) -> Any:
        """The place after seq.tokens."""
        ...

    def offers(self, place: Any) -> Seq[Offer]:
        """The likeliest next tokens, each once."""
        ...

    def follow(self, place: Any, token: int) -> Any:
        """The place after one more token; None if nothing is known there."""
        ...


class Compiled(NamedTuple):
    """What an opened drafter's optional method `compiled(library)` returns: a compiled form that makes the same offers. source: its address
    (native/source.h); whole: it has a memory of its own and takes the drafter's place, else the drafter goes on to learn and the compiled
    form reads what it learned; unit: bytes of each unit of its memory."""

    source: int
    whole: bool = True
    unit: int = 0

    @classmethod
    def new(cls, library: Any, name: str, *arguments: int, whole: bool = True, unit: int = 0) -> Compiled:
        """library: the loaded native library; name: of its function that makes the source, which takes these integers."""
        function = library[name]
        function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_int64] * len(arguments)
        return cls(function(*arguments), whole, unit)


WIDTHS, DEPTHS = 4, 8  # ranks among siblings, and depths, that trees distinguish
SCORES = 8  # classes of a score
USUAL = 0.9  # how far the log-odds of tokens without other evidence are below 0, see prior.json
MOST_TOKENS = 1 << 31  # the vocabulary is checked with the finished tree


class Trees:
    """A Source of the trees that a drafter proposes. A bucket is the score of a node given its parent's, or without scores its rank
    among its siblings and its depth. max_rows: the largest budget."""

    buckets = SCORES + WIDTHS * DEPTHS
    prior = (*(log((2 * i + 1) / (2 * (SCORES - i) - 1)) + USUAL for i in range(SCORES)), *[0.0] * (WIDTHS * DEPTHS))  # scores come true

    def __init__(self, drafter: OpenDrafter, max_rows: int = 8) -> None:
        self.drafter, self.budget = drafter, Budget(max_rows, max_rows)

    def start(self, seq: Sequence) -> Any:
        return self.starts([seq])[0]

    def starts(self, seqs: Seq[Sequence]) -> list[Any]:
        """The place after the tokens of each text. The drafter is asked once for all."""
        found: list[Any] = []
        for tree in self.drafter.propose(seqs, [self.budget] * len(seqs)):
            tree.check(vocab=MOST_TOKENS, rows=self.budget.rows, depth=self.budget.depth)  # its arrays are read without further checks
            found.append((_Children(tree), -1) if len(tree) else None)
        return found

    def offers(self, place: Any) -> Seq[Offer]:
        children, node = place
        found: Seq[Offer] = children.offers.get(node, ())
        return found

    def follow(self, place: Any, token: int) -> Any:
        children, node = place
        found = children.tree.child(node, token)
        return None if found < 0 else (children, found)


class _Children:
    """The offers at each node of a tree. buckets: i32[N], of each node."""

    def __init__(self, tree: TokenTree) -> None:
        self.tree = tree
        self.offers: dict[int, list[Offer]] = {}
        self.buckets = np.zeros(len(tree), np.int32)
        scores = None if tree.scores is None else tree.scores.tolist()
        for node, (token, parent, depth) in enumerate(
            zip(tree.tokens.tolist(), tree.parents.tolist(), tree.depths().tolist(), strict=True)
        ):
            own = self.offers.setdefault(parent, [])
            if scores is None:
                bucket = SCORES + WIDTHS * min(depth - 1, DEPTHS - 1) + min(len(own), WIDTHS - 1)
            else:
                above = scores[parent] if parent >= 0 else 1.0
                bucket = max(0, min(SCORES - 1, int(SCORES * scores[node] / max(above, 1e-9))))
            own.append((token, bucket))
            self.buckets[node] = bucket


def source_of(drafter: OpenDrafter) -> Source:
    """The drafter itself if it offers single tokens, else its trees."""
    return drafter if isinstance(drafter, Source) else Trees(drafter)
