"""Which nodes to draft when the chances of tokens are known: how often each rank was right, and the best tree of so many nodes.

The tree is that of Medusa (Tianle Cai, Yuhong Li, Zhengyang Geng, Hongwu Peng, Jason D. Lee, Deming Chen, Tri Dao: Medusa: Simple LLM
Inference Acceleration Framework with Multiple Decoding Heads, 2024, arXiv 2401.10774): the nodes with the largest products of chances
along their paths. The chances are measured while texts are generated, not before.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from heapq import heappush, heapreplace
from typing import NamedTuple

import numpy as np

from redraft.core.tree import EMPTY, TokenTree

CERTAINTY = 16.0  # steps that the rates assumed at the start count for
TOP, FALL, DEEPER = 0.4, 1.5, 0.85  # the assumed rate of the first rank, the power by which ranks fall, the factor of each depth
FORGET = 4096.0  # steps after which old ones count half


class Offer(NamedTuple):
    """The likeliest tokens after a node, best first, and the probabilities that the drafter gives them."""

    tokens: Seq[int]
    chances: Seq[float]


class Growth:
    """A tree that grows level by level and keeps the nodes with the largest values, at most `rows`. A value is the product of the values
    along a path, each from 0 to 1, so with a node its parent is kept. depth: the most levels; offers: by node, -1 for the root; every:
    the offers of each depth, if they do not depend on the path."""

    def __init__(self, rows: int, depth: int) -> None:
        self.rows, self.depth = rows, depth
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.values: list[float] = []
        self.scores: list[float] = []
        self.offers: dict[int, Offer] = {}
        self.every: Seq[Offer] = ()
        self._best: list[float] = []  # a heap of the largest values
        self._children: dict[tuple[int, int], int] = {}
        self._level = -1  # the first node of the last level

    @property
    def least(self) -> float:
        """What a further node must exceed."""
        return self._best[0] if len(self._best) == self.rows else 0.0

    def open(self, best: float) -> list[int]:
        """The nodes of the last level, below which a child of value `best` would be kept. The level ends."""
        if self._level < 0:
            self._level = 0
            return [-1]
        first, self._level, least = self._level, len(self.tokens), self.least
        return [node for node in range(first, self._level) if self.values[node] * best > least]

    def extend(self, node: int, offer: Offer, values: Seq[float], scores: Seq[float]) -> None:
        """Adds children. values: falling, of the tokens of the offer; scores: their probabilities."""
        value, score = (self.values[node], self.scores[node]) if node >= 0 else (1.0, 1.0)
        self.offers[node] = offer
        for token, own, chance in zip(offer.tokens, values, scores, strict=False):
            found = value * own
            if found <= self.least:
                break
            (heapreplace if len(self._best) == self.rows else heappush)(self._best, found)
            self._children[node, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(node)
            self.values.append(found)
            self.scores.append(score * chance)

    def child(self, node: int, token: int) -> int:
        """The child of a node with this token, -1 for none."""
        return self._children.get((node, token), -1)

    def tree(self) -> TokenTree:
        """The kept nodes."""
        if not self.tokens:
            return EMPTY
        kept: Seq[int] = range(len(self.tokens))
        if len(kept) > self.rows:
            kept = sorted(sorted(kept, key=lambda node: -self.values[node])[: self.rows])  # a parent has the lower number
        place = {-1: -1, **{node: i for i, node in enumerate(kept)}}
        return TokenTree(
            np.array([self.tokens[node] for node in kept], np.int32),
            np.array([place[self.parents[node]] for node in kept], np.int32),
            np.zeros(len(kept) + 1, np.uint8),
            scores=np.array([self.scores[node] for node in kept], np.float32),
        )


class HitRates:
    """How often the token of each rank is right, at each depth, where the path above it was. Also how the probabilities that a drafter
    promised compare with that. start: the rates to assume at first, [depths][ranks]."""

    def __init__(self, depths: int, ranks: int, start: Seq[Seq[float]] = ()) -> None:
        rates = start or [[TOP * DEEPER**depth / (rank + 1) ** FALL for rank in range(ranks)] for depth in range(depths)]
        self.tries = [CERTAINTY] * depths
        self.hits = [[CERTAINTY * rate for rate in (*row, *[0.0] * ranks)[:ranks]] for row in rates]
        self.promised = [sum(row) for row in self.hits]

    def rates(self, depth: int) -> list[float]:
        """Of the ranks at this depth (0: below the root), falling."""
        found, least, tries = [], 1.0, self.tries[depth]
        for hits in self.hits[depth]:
            least = min(least, hits / tries)
            found.append(least)
        return found

    def factor(self, depth: int) -> float:
        """By which the probabilities at this depth come true more often than promised."""
        return sum(self.hits[depth]) / max(self.promised[depth], 1e-9)

    def learn(self, growth: Growth, tokens: Seq[int]) -> None:
        """tokens: what followed in the text, as far as it is known."""
        node = -1
        for depth, token in enumerate(tokens[: len(self.tries)]):
            offer = growth.every[depth] if depth < len(growth.every) else growth.offers.get(node)
            if offer is None:
                return
            self._count(depth, offer, token)
            node = growth.child(node, token)
            if node < 0 and not growth.every:
                return

    def _count(self, depth: int, offer: Offer, token: int) -> None:
        self.tries[depth] += 1
        self.promised[depth] += sum(offer.chances)
        if token in offer.tokens:
            self.hits[depth][offer.tokens.index(token)] += 1
        if self.tries[depth] > FORGET:
            self.tries[depth] /= 2
            self.promised[depth] /= 2
            self.hits[depth] = [hits / 2 for hits in self.hits[depth]]

    def snapshot(self) -> tuple[list[float], list[list[float]], list[float]]:
        return list(self.tries), [list(row) for row in self.hits], list(self.promised)

    def restore(self, snapshot: tuple[list[float], list[list[float]], list[float]]) -> None:
        tries, hits, promised = snapshot
        self.tries, self.hits, self.promised = list(tries), [list(row) for row in hits], list(promised)
