"""The interface of schedulers: a function from waiting sequences, running sequences and the memory to the rows of each sequence.

`plan` has no side effects; the engine carries the plan out. The simulator runs the same class.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar, Protocol

from redraft.card import Card
from redraft.core.plan import Budget, StepPlan, Work
from redraft.core.sequence import Lanes, Sequence
from redraft.errors import InvalidInput


class Pages(Protocol):
    """The part of the memory that a scheduler may read. All numbers are blocks, except `match`, which returns tokens."""

    blocks: int

    def need(self, seq: Sequence, rows: int, matched: int = 0) -> int: ...
    def available(self) -> int: ...
    def match(self, tokens: Seq[int], salt: str) -> int: ...
    def idle_matched(self, tokens: Seq[int], salt: str) -> int: ...
    def gain(self, seq: Sequence) -> int: ...


@dataclass(frozen=True)
class Scheduler:
    """Base class of schedulers: budgets, preemption of the last arrivals, admission in arrival order.

    token_budget: the most rows a step; max_seqs: the most running sequences; draft_rows: the most drafted nodes a sequence;
    draft_total: the most drafted nodes a step, shared evenly; watermark: the fraction of the pool that admission leaves free.
    """

    token_budget: int = 512
    max_seqs: int = 64
    draft_rows: int = 16
    draft_total: int = 32
    watermark: float = 0.01

    card: ClassVar[Card]

    def __post_init__(self) -> None:
        if self.token_budget < self.max_seqs:
            raise InvalidInput(f"token_budget = {self.token_budget} is less than max_seqs = {self.max_seqs}: some texts would stall")

    def order(self, running: Seq[Sequence]) -> list[Sequence]:
        """The order in which running sequences get rows. A subclass defines it."""
        raise NotImplementedError

    def plan(self, waiting: Seq[Sequence], running: Seq[Sequence], table: Pages) -> StepPlan:
        # 1. Every running text needs blocks for its pending rows. The last arrivals are preempted until these fit. Prompts in
        #    progress keep the blocks that admission set aside for them.
        run, preempt, free = list(running), [], table.available()
        needs = {seq.id: table.need(seq, seq.pending) for seq in run}
        while len(run) > 1 and sum(needs[seq.id] for seq in run) > free:
            victim = run.pop()
            preempt.append(victim)
            free += table.gain(victim)
        spare = free - sum(needs[seq.id] for seq in run)

        # 2. Sequences get rows in order. Drafts are shared evenly among decoding texts, and dropped first if blocks or rows are short.
        ordered = self.order(run)
        drawing = sum(seq.pending == 1 for seq in run)
        room = max(0, self.token_budget - drawing)  # rows left after one for each decoding text
        if waiting or drawing < len(run):
            room //= 2  # drafts never take all rows from prompts
        depths = {seq.id: _depth(seq) for seq in run}
        drafts, drafting = min(self.draft_total, room), sum(depth > 0 for depth in depths.values())
        left = self.token_budget - drafts
        work: list[Work] = []
        budgets: list[Budget] = []
        for seq in ordered:
            rows = min(seq.pending, seq.sync_point - seq.stored, left)
            if rows <= 0:
                continue
            left -= rows
            draft, depth = 0, depths[seq.id]
            if depth:
                draft = min(self.draft_rows, seq.drafts, drafts // drafting)
                while draft and table.need(seq, rows + draft) - needs[seq.id] > spare:
                    draft //= 2
                spare -= table.need(seq, rows + draft) - needs[seq.id] if draft else 0
                drafts, drafting = drafts - draft, drafting - 1
            work.append(Work(seq, rows))
            budgets.append(Budget(draft, depth if draft else 0))
        left += drafts  # unused draft rows go to new requests

        # 3. New requests in arrival order, while the whole prompt and one token fit. A request that does not fit blocks the queue.
        admit: list[tuple[Sequence, int]] = []
        if not preempt:
            for seq in waiting:
                if len(run) + len(admit) == self.max_seqs or left <= 0:
                    break
                salt = seq.request.salt
                skippable = min(seq.shareable_tokens, seq.request.wants.skippable)
                shares = seq.cache.lanes is Lanes.SHARED and skippable  # only shared lanes attach pages
                tokens = seq.tokens[: skippable + 1]  # at most all but the last of them match
                matched = table.match(tokens, salt) if shares else 0
                cost = table.need(seq, len(seq.tokens) + 1, matched) + (table.idle_matched(tokens, salt) if matched else 0)
                if matched and (alone := table.need(seq, len(seq.tokens) + 1)) < cost:  # the match would cost more copies than it saves
                    matched, cost = 0, alone
                reserve = int(self.watermark * table.blocks) if run or admit else 0
                if cost > spare - reserve:
                    break
                spare -= cost
                admit.append((seq, matched))
                rows = min(len(seq.tokens) - matched, seq.sync_point - matched, left)
                if rows > 0:
                    left -= rows
                    work.append(Work(seq, rows))
                    budgets.append(Budget(0, 0))
        return StepPlan(work, budgets, admit, preempt)


def _depth(seq: Sequence) -> int:
    """The largest depth of a draft: 0 for a prompt in progress, without a drafter or while it rests, and if only one more token fits. A
    constraint drafts also while the drafter rests."""
    asked = seq.drafts and seq.pending == 1 and (seq.constrained or not (seq.rest or seq.fault))
    return max(0, seq.sync_point - len(seq.tokens)) if asked else 0
