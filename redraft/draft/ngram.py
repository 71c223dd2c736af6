"""Counts which token followed the last tokens, in all texts of a tenant so far, and drafts the most frequent ones.

Jie Ou, Yueming Chen, Wenhong Tian: Lossless Acceleration of Large Language Model via Adaptive N-gram Parallel Decoding, 2024,
arXiv 2404.08698.

1. Count, for the last ORDER tokens and for the last ORDER - 1, the tokens that followed them in prompts and outputs.
2. The next tokens are the WIDTH most frequent ones after the last ORDER tokens, or if these are new, after the last ORDER - 1.
3. Draft the tree of next tokens, best first by the product of their shares of the counts.

Differs: a tree instead of a chain; counts outlive the request, per tenant; they are bounded by two generations: when the young one is
full it becomes the old one, and the old one is dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, ClassVar

import numpy as np

from redraft.card import Card, Guarantee
from redraft.core.plan import Budget
from redraft.core.sequence import Sequence
from redraft.core.tree import EMPTY, TokenTree
from redraft.draft.drafter import Stateless
from redraft.draft.source import Compiled, Offer
from redraft.options import Options, number

ORDER = 3
WIDTH = 3
ENTRY_BYTES = 350  # of memory for one context
TENANTS = 64  # tenants with counts of their own; the one that was idle longest is dropped first

Context = tuple[int, ...]
Counts = dict[int, int]  # token -> how often it followed


class Table:
    """The counts of one tenant. limit: contexts of a generation."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.young: dict[Context, Counts] = {}
        self.old: dict[Context, Counts] = {}

    def __len__(self) -> int:
        return len(self.young) + len(self.old)

    def learn(self, tokens: Seq[int], start: int) -> None:  # 1.
        """Counts tokens[start:] after the tokens before them."""
        for i in range(max(start, ORDER - 1), len(tokens)):
            token = tokens[i]
            for n in (ORDER - 1, ORDER) if i >= ORDER else (ORDER - 1,):
                context = tuple(tokens[i - n : i])
                counts = self.young.get(context)
                if counts is None:
                    counts = self.young[context] = self.old.pop(context, {})
                counts[token] = counts.get(token, 0) + 1
        if len(self.young) > self.limit:
            self.young, self.old = {}, self.young

    def find(self, context: Context) -> Counts | None:
        return self.young.get(context) or self.old.get(context)


@dataclass(frozen=True)
class NGram(Options):
    """history: contexts that are kept for each tenant, at most twice as many while they change generation."""

    history: int = number(65536, ge=1, le=1 << 20)

    card: ClassVar[Card] = Card(
        "N-gram counts",
        "Ou, Chen, Tian, Lossless Acceleration of Large Language Model via Adaptive N-gram Parallel Decoding, 2024, arXiv 2404.08698",
        Guarantee.SAME_TEXT,
        deviates="a tree instead of a chain; counts outlive the request, per tenant, and are bounded",
        summary="Frequent continuations of the last tokens; repeated work",
    )

    def max_bytes(self, runner: Any) -> int:
        return 2 * ENTRY_BYTES * self.history

    def open(self, runner: Any, sampler: Any) -> Counter:
        return Counter(self.history)


@dataclass(eq=False)
class Reader:
    """seen: the tokens of `seq` that were counted."""

    seq: Sequence
    table: Table
    seen: int = 0

    def catch_up(self) -> None:
        tokens = self.seq.tokens
        if self.seen < len(tokens):
            self.table.learn(tokens, self.seen)
            self.seen = len(tokens)


class Counter(Stateless):
    """The opened drafter. Tenants (`Request.salt`) do not share counts. The limit of contexts is divided among them."""

    buckets = 2 * 4 * 4  # order, share of the counts, count

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tables: OrderedDict[str, Table] = OrderedDict()

    @property
    def bytes(self) -> int:
        return ENTRY_BYTES * sum(map(len, self.tables.values()))

    def begin(self, seq: Sequence) -> Reader:
        salt = seq.request.salt
        table = self.tables.setdefault(salt, Table(self.limit // 2))
        self.tables.move_to_end(salt)
        while len(self.tables) > 1 and (len(self.tables) > TENANTS or sum(map(len, self.tables.values())) > 2 * self.limit):
            self.tables.popitem(last=False)
        return Reader(seq, table)

    def end(self, state: Reader) -> None:
        state.catch_up()

    def propose(self, seqs: Seq[Sequence], budgets: Seq[Budget]) -> list[TokenTree]:
        return [self._tree(seq, budget) if min(budget) > 0 else EMPTY for seq, budget in zip(seqs, budgets, strict=True)]

    def _tree(self, seq: Sequence, budget: Budget) -> TokenTree:  # 3.
        tokens: list[int] = []
        parents: list[int] = []
        scores: list[float] = []
        heap: list[tuple[float, int, int, int, Any]] = []  # -probability, parent, depth, token, place of the parent

        def expand(parent: int, depth: int, score: float, place: Any) -> None:
            for token, share, _ in self._next(place):
                heappush(heap, (-score * share, parent, depth, token, place))

        expand(-1, 1, 1.0, self.start(seq))
        while heap and len(tokens) < budget.rows:
            score, parent, depth, token, place = heappop(heap)
            tokens.append(token)
            parents.append(parent)
            scores.append(-score)
            if depth < budget.depth:
                expand(len(tokens) - 1, depth + 1, -score, self.follow(place, token))
        if not tokens:
            return EMPTY
        kinds = np.zeros(len(tokens) + 1, np.uint8)
        return TokenTree(np.array(tokens, np.int32), np.array(parents, np.int32), kinds, scores=np.array(scores, np.float32))

    # ---- offers of single tokens; a place is (table, last tokens)

    def start(self, seq: Sequence) -> Any:
        state = seq.state[self]
        state.catch_up()
        return state.table, tuple(seq.tokens[-ORDER:])

    def follow(self, place: Any, token: int) -> Any:
        table, context = place
        return table, (*context[1 - ORDER :], token)

    def offers(self, place: Any) -> list[Offer]:
        return [(token, bucket) for token, _, bucket in self._next(place)]

    def _next(self, place: Any) -> list[tuple[int, float, int]]:  # 2.
        """(token, share of the counts, bucket), best first."""
        table, context = place
        order = 0
        counts = table.find(context) if len(context) == ORDER else None
        if counts is None:
            order = 1
            counts = table.find(context[1 - ORDER :])
            if counts is None:
                return []
        if len(counts) == 1:
            ((token, count),) = counts.items()
            return [(token, 1.0, 16 * order + 12 + min(count, 4) - 1)]
        total = sum(counts.values())
        best = sorted(counts.items(), key=lambda item: -item[1])[:WIDTH]
        return [(t, c / total, 16 * order + 4 * (c * 4 > total) + 4 * (c * 2 > total) + min(c, 4) - 1) for t, c in best]

    def compiled(self, library: Any) -> Compiled:
        return Compiled.new(library, "rd_ngram", self.limit, unit=ENTRY_BYTES)

    # ---- what it learned

    def snapshot(self) -> Any:
        return [(salt, _copy(table.young), _copy(table.old)) for salt, table in self.tables.items()]

    def restore(self, snapshot: Any) -> None:
        self.tables = OrderedDict()
        for salt, young, old in snapshot:
            table = self.tables[salt] = Table(self.limit // 2)
            table.young, table.old = _copy(young), _copy(old)


def _copy(counts: dict[Context, Counts]) -> dict[Context, Counts]:
    return {context: dict(found) for context, found in counts.items()}
