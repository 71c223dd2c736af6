"""The seam of schedulers: a pure function of what waits, what runs and the page table to rows per sequence.

`plan` changes nothing; the engine enacts it. A simulator runs the very same class.
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
    """What a scheduler may ask of the page table; all in blocks, read-only."""

    blocks: int

    def need(self, seq: Sequence, rows: int, matched: int = 0) -> int: ...
    def available(self) -> int: ...
    def match(self, tokens: Seq[int], salt: str) -> int: ...
    def idle_matched(self, tokens: Seq[int], salt: str) -> int: ...
    def gain(self, seq: Sequence) -> int: ...


@dataclass(frozen=True)
class Scheduler:
    """What every scheduler shares: budgets, preemption from the end, admission in arrival order.

    token_budget: rows a step; max_seqs: sequences that run at once; draft_rows: drafted nodes a sequence;
    draft_total: drafted nodes a step, shared evenly; watermark: fraction of the pool that admission leaves free.
    """

    token_budget: int = 512
    max_seqs: int = 64
    draft_rows: int = 16
    draft_total: int = 32
    watermark: float = 0.01

    card: ClassVar[Card]

    def __post_init__(self) -> None:
        if self.token_budget < self.max_seqs:
            raise InvalidInput(f"token_budget = {self.token_budget} is less than max_seqs = {self.max_seqs}: some text would stall")

    def order(self, running: Seq[Sequence]) -> list[Sequence]:
        """Who takes rows first. What a subclass decides."""
        raise NotImplementedError

    def plan(self, waiting: Seq[Sequence], running: Seq[Sequence], table: Pages) -> StepPlan:
        # 1. Every text that draws gets a row; the last to arrive are preempted until all of these fit. Prompts in
        #    progress keep the pages they were promised at admission.
        run, preempt, free = list(running), [], table.available()
        needs = {seq.id: table.need(seq, seq.pending) for seq in run}
        while len(run) > 1 and sum(needs[seq.id] for seq in run) > free:
            victim = run.pop()
            preempt.append(victim)
            free += table.gain(victim)
        spare = free - sum(needs[seq.id] for seq in run)

        # 2. Rows in order, drafts shared evenly among those that draw, and given up first when pages or rows run short.
        ordered = self.order(run)
        drawing = sum(seq.pending == 1 for seq in run)
        room = max(0, self.token_budget - drawing)  # rows that no text needs to draw
        if waiting or drawing < len(run):
            room //= 2  # drafts never take all rows from prompts
        drafts, drafting = min(self.draft_total, room), sum(_depth(seq) > 0 for seq in run)
        left = self.token_budget - drafts
        work: list[Work] = []
        budgets: list[Budget] = []
        for seq in ordered:
            rows = min(seq.pending, seq.sync_point - seq.stored, left)
            if rows <= 0:
                continue
            left -= rows
            draft, depth = 0, _depth(seq)
            if depth:
                draft = min(self.draft_rows, seq.drafts, drafts // drafting)
                while draft and table.need(seq, rows + draft) - needs[seq.id] > spare:
                    draft //= 2
                spare -= table.need(seq, rows + draft) - needs[seq.id] if draft else 0
                drafts, drafting = drafts - draft, drafting - 1
            work.append(Work(seq, rows))
            budgets.append(Budget(draft, depth if draft else 0))
        left += drafts  # what is not drafted is left to newcomers

        # 3. Newcomers in arrival order while the whole prompt and one token fit; the head of the queue blocks.
        admit: list[tuple[Sequence, int]] = []
        if not preempt:
            for seq in waiting:
                if len(run) + len(admit) == self.max_seqs or left <= 0:
                    break
                salt = seq.request.salt
                shares = seq.cache.lanes is Lanes.SHARED and not seq.request.wants.whole_prompt  # only shared lanes attach pages
                tokens = seq.tokens[: seq.shareable_tokens + 1]  # at most all but the last of them match
                matched = table.match(tokens, salt) if shares else 0
                cost = table.need(seq, len(seq.tokens) + 1, matched) + (table.idle_matched(tokens, salt) if matched else 0)
                if matched and (alone := table.need(seq, len(seq.tokens) + 1)) < cost:  # it would copy more than it finds
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
    """How deep a draft may be: 0 for a prompt in progress, a text with no room for a second token or without a drafter."""
    return max(0, seq.sync_point - len(seq.tokens)) if seq.pending == 1 and seq.drafts and not seq.fault else 0
