"""How drafters that sample from a model build a tree: the distribution after each node, and the children drawn from it.

A method is a generator, `grow(sketch)`. It adds nodes drawn from known distributions. Each `yield` requests the distributions
after all nodes added since the last one. The trees of all sequences grow together, with one forward pass of the drafting model a
level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from redraft.core.noise import Stream, gumbel, key, mix, uniform
from redraft.core.plan import Budget
from redraft.core.ranking import top
from redraft.core.sequence import Sequence
from redraft.core.tree import EMPTY, F64, I64, Kind, TokenTree
from redraft.draft.drafter import DraftSampler
from redraft.options import Options, number

UNDERFLOW = 600.0  # nats below the likeliest token; coin-tossing rules need q > 0 in float64, so less likely tokens are not drawn

Noise = Callable[[int, I64], F64]


class NextDistribution:
    """The draft distribution of the token after one node. ids: i64[M], ascending, the tokens with mass; logq: f64[M], the log of
    the distribution from which children are drawn; noise: the key of the node's noise, None at temperature 0; total: the
    log-sum-exp over all tokens if `values` covers only some of them."""

    def __init__(
        self, ids: I64, values: F64, noise: int | None, *, target: bool, total: float | None = None, noise_of: Noise = gumbel
    ) -> None:
        floor = -np.inf if noise is None or target else values.max(initial=-np.inf) - UNDERFLOW
        if len(alive := np.flatnonzero(values > floor)) < len(ids):
            ids, values = ids[alive], values[alive]
        self.ids, self._noise, self._target, self._gumbel = ids, noise, target, noise_of
        self._order: list[int] = []
        if len(ids):  # what was changed after `total` was taken, as by a bias, must not make probabilities above 1
            best = values.max()
            own = best + np.log(np.exp(values - best).sum())
            total = own if total is None else max(total, own)
        self.logq: F64 = values if total is None else values - total

    @cached_property
    def keys(self) -> F64:
        """f64[M]: log q plus Gumbel noise, the order in which children are drawn; log q itself at temperature 0."""
        return self.logq if self._noise is None else self.logq + self._gumbel(self._noise, self.ids)

    def best(self, k: int) -> list[int]:
        """The places in ids of the k largest keys, best first: k samples without replacement, in draw order. Fewer if fewer
        tokens have mass."""
        return [int(place) for place in top(self.keys, min(k, len(self.ids)))]

    def likeliest(self, k: int) -> list[int]:
        """The places in ids of the k largest probabilities, best first."""
        return [int(place) for place in top(self.logq, min(k, len(self.ids)))]

    def nth(self, i: int) -> int | None:
        """The place of the i-th sample without replacement, from 0; None if fewer than i + 1 tokens have mass."""
        while i >= len(self._order) < len(self.ids):
            if len(found := self.best(2 * (i + 1))) <= len(self._order):
                raise ValueError("the draft distribution contains NaN")
            self._order = found
        return self._order[i] if i < len(self._order) else None

    def samples(self, numbers: Seq[int]) -> list[int]:
        """The places of independent samples, one for each draw number. With the target's noise, number 0 draws with that noise.
        At temperature 0 all are the likeliest token."""
        if self._noise is None or not len(self.ids):
            return self.best(1) * len(numbers)
        sums = np.cumsum(np.exp(self.logq))
        coins = uniform(mix(self._noise, 1), np.asarray(numbers)) * sums[-1]
        places = np.searchsorted(sums, coins, side="right").tolist()
        return [self.best(1)[0] if self._target and number == 0 else place for number, place in zip(numbers, places, strict=True)]


class Sketch:
    """A tree under construction, the argument of `grow`. Node -1 is the text's last token."""

    def __init__(self, seq: Sequence, budget: Budget, kind: Kind, sampler: DraftSampler) -> None:
        self.seq, self.budget, self.sampler = seq, budget, sampler
        self.kind = Kind.FIXED if seq.params.greedy else kind
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.draws: list[int] = []
        self.scores: list[float] = []
        self.distributions: list[NextDistribution] = []  # of node i at place i + 1
        self._children: dict[tuple[int, int], int] = {}
        self._noise: dict[int, F64] = {}
        self._ends = frozenset() if seq.params.ignore_eos else sampler.vocabulary.eos

    # ---- for methods

    @property
    def room(self) -> int:
        """The number of nodes that can still be added."""
        return self.budget.rows - len(self.tokens)

    @property
    def greedy(self) -> bool:
        return self.seq.params.greedy

    def distribution(self, node: int) -> NextDistribution:
        return self.distributions[node + 1]

    def open(self, node: int) -> bool:
        """Whether `node` can have children: its depth is below the limit, and its token does not end the text."""
        return node < 0 or (self.depths[node] < self.budget.depth and self.tokens[node] not in self._ends)

    def add(self, parent: int, place: int) -> int:
        """Adds a child of `parent` with the token at `place` of its distribution and returns the node. If the child exists already,
        returns that node and counts one more draw of it."""
        distribution = self.distribution(parent)
        token = int(distribution.ids[place])
        if (node := self._children.setdefault((parent, token), len(self.tokens))) < len(self.tokens):
            self.draws.append(node)
            return node
        above, depth = (1.0, 0) if parent < 0 else (self.scores[parent], self.depths[parent])
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(depth + 1)
        self.scores.append(above * float(np.exp(distribution.logq[place])))
        self.draws.append(node)
        return node

    # ---- for the grower

    def _gumbel(self, noise: int, ids: I64) -> F64:
        """Nodes of one depth share the target's noise, so noise over the whole vocabulary is computed once for them."""
        if len(ids) < self.sampler.vocabulary.size:
            return gumbel(noise, ids)
        if noise not in self._noise:
            self._noise[noise] = gumbel(noise, ids)
        return self._noise[noise]

    def learn(self, node: int, values: F64, total: float | None = None) -> None:
        """Receives the drafting model's logits f64[V] of the token after `node`; total: see NextDistribution."""
        path: list[int] = []
        at = node
        while at >= 0:
            path.append(self.tokens[at])
            at = self.parents[at]
        path.reverse()
        row = self.sampler.row(values, self.seq, path)
        target = self.sampler.drafts is Stream.TARGET
        noise = None
        if not self.seq.params.greedy:
            noise = key(self.seq.seed, self.sampler.drafts, len(self.seq.tokens) + len(path))
            if not target:
                # For rules that toss coins, nodes of one depth must not share noise. The number of children of one node can
                # depend on the draws of another, and with shared noise these would reveal its own next draw.
                noise = mix(noise, *path)
        self.distributions.append(NextDistribution(row.ids, row.values, noise, target=target, total=total, noise_of=self._gumbel))

    def tree(self) -> TokenTree:
        n = len(self.tokens)
        if not n:
            return EMPTY
        kinds = np.zeros(n + 1, np.uint8)
        kinds[[parent + 1 for parent in self.parents]] = self.kind
        return TokenTree(
            np.array(self.tokens, np.int32),
            np.array(self.parents, np.int32),
            kinds,
            distributions=None if self.kind is Kind.FIXED else Distributions(self.distributions, self.sampler.vocabulary.size),
            draws=np.array(self.draws, np.int32) if self.kind is Kind.IID else None,
            scores=np.array(self.scores, np.float32),
        )


@dataclass(frozen=True, eq=False, slots=True)
class Distributions:
    """The draft distributions of a sketch's nodes. Dense rows are made only when a verifier requests them."""

    distributions: list[NextDistribution]
    vocab: int

    def probs(self, rows: Seq[int]) -> F64:
        out = np.zeros((len(rows), self.vocab))
        for i, row in enumerate(rows):
            distribution = self.distributions[row]
            q = np.exp(distribution.logq)
            out[i, distribution.ids] = q / q.sum()
        return out


@dataclass(frozen=True)
class TreeDrafter(Options):
    """Base class of drafters that sample a tree from a model. candidates: children are drawn from this many of the likeliest tokens,
    renormalised; 0: from all."""

    candidates: int = number(0, ge=0, kw_only=True)

    kind: ClassVar[Kind]

    def grow(self, tree: Sketch) -> Iterator[None]:
        """Adds nodes. Every yield requests the distributions after all nodes added since the last one."""
        raise NotImplementedError
