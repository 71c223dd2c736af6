"""What the drafts of a step take of memory, predicted before they are made, and budgets cut to a limit.

Selin Yildirim, Deming Chen: SpecMemo: Speculative Decoding is in Your Pocket, 2025, arXiv 2506.01986.

1. A drafted node takes a row of logits, if any text of the step draws from logits, and a row of the mask of its tree.
2. The nodes of a text may take further blocks of the cache until the step ends.
3. Texts share the limit evenly. The draft of a text shrinks until it fits, to nothing if need be.

Differs: only the limit decides, not the gain of a node. Activations are not counted: a step has as many rows without drafts. Nor is
what a drafter itself computes with.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from redraft.core.plan import Budget, StepPlan, Work
from redraft.sched.scheduler import Pages

WORD = 64  # nodes in a word of the mask
NOTHING = Budget(0, 0)


@dataclass(frozen=True)
class DraftMemory:
    """limit: the most bytes that the drafts of a step may take; row: bytes of a row of logits; block: bytes of a block of the cache."""

    limit: int
    row: int
    block: int

    def predict(self, work: Seq[Work], sizes: Seq[int], pages: Pages, *, logits: bool) -> int:
        """Bytes of drafts of so many nodes. logits: whether any text of the step draws from logits."""
        return sum(self._bytes(one, size, pages, logits, max(sizes)) for one, size in zip(work, sizes, strict=True))

    def cut(self, plan: StepPlan, pages: Pages, *, logits: bool) -> StepPlan:
        """The plan with budgets that keep its drafts within the limit."""
        left, drafting = self.limit, sum(budget.rows > 0 for budget in plan.budgets)
        budgets: list[Budget] = []
        widest = max((budget.rows for budget in plan.budgets), default=0)
        for one, budget in zip(plan.work, plan.budgets, strict=True):
            if not budget.rows:
                budgets.append(budget)
                continue
            share = left // drafting
            rows = min(budget.rows, share // self._node(logits, widest))
            while rows and self._bytes(one, rows, pages, logits, widest) > share:
                rows -= 1
            left, drafting = left - self._bytes(one, rows, pages, logits, widest), drafting - 1
            budgets.append(budget._replace(rows=rows) if rows else NOTHING)
        return replace(plan, budgets=budgets)

    def _node(self, logits: bool, widest: int) -> int:
        return self.row * logits + -(-widest // WORD) * 8  # 1.

    def _bytes(self, one: Work, nodes: int, pages: Pages, logits: bool, widest: int) -> int:
        if not nodes:
            return 0
        more = pages.need(one.seq, one.rows + nodes) - pages.need(one.seq, one.rows)
        return nodes * self._node(logits, widest) + more * self.block  # 2.
