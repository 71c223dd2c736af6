"""The interface of schedulers: a function from waiting sequences, running sequences and the memory to the rows of each sequence.

`plan` has no side effects; the engine carries the plan out. The simulator runs the same class.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar, Protocol

from redraft.card import Card
from redraft.core.plan import Budget, StepPlan, Work
from redraft.core.sequence import Group, Sequence
from redraft.errors import InvalidInput
from redraft.options import Options


class Pages(Protocol):
    """The part of the memory that a scheduler may read. All numbers are blocks, except `match`, which returns tokens."""

    blocks: int

    def need(self, seq: Sequence, rows: int, matched: int = 0) -> int: ...
    def available(self) -> int: ...
    def match(self, tokens: Seq[int], salt: str) -> int: ...
    def idle_matched(self, tokens: Seq[int], salt: str) -> int: ...
    def gain(self, seq: Sequence) -> int: ...


@dataclass(frozen=True)
class Scheduler(Options):
    """Base class of schedulers: budgets, preemption of the last arrivals, admission.

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
        super().__post_init__()
        if self.token_budget < self.max_seqs:
            raise InvalidInput(f"token_budget = {self.token_budget} is less than max_seqs = {self.max_seqs}: some texts would stall")

    def order(self, running: Seq[Sequence], waiting: Seq[Sequence] = ()) -> Iterable[Sequence]:
        """All sequences in the order in which they get rows and, if they wait, are admitted. Both are given by priority, then arrival.
        Sequences that draw tokens come before waiting ones. A subclass defines it."""
        raise NotImplementedError

    def chunk(self, left: int, prompts: int) -> int:
        """The most rows of a prompt in this step. left: rows that are not given yet; prompts: how many prompts have got some."""
        return left

    def groups(self, waiting: Seq[Sequence], page: int) -> list[tuple[Group, list[Sequence]]]:
        """The requests of a batch that wait, all of them once, in the order in which they should wait, by what their prompts share. page:
        tokens of a page. Empty if they stay in order of arrival."""
        return []

    def reserve(self, seqs: Seq[Sequence], table: Pages) -> int:
        """The blocks that must stay free for these texts when the last of them, which waits, is admitted after the others."""
        return int(self.watermark * table.blocks) if len(seqs) > 1 else 0

    def plan(self, waiting: Seq[Sequence], running: Seq[Sequence], table: Pages, least: int = 1) -> StepPlan:
        """least: running texts that are not preempted; 0 if texts that do not run hold memory, because then one alone may lack some."""
        # 1. Every running text needs blocks for its pending rows. The last arrivals are preempted until these fit. Prompts in
        #    progress keep the blocks that admission set aside for them.
        run, preempt, free = list(running), [], table.available()
        needs = {seq.id: table.need(seq, seq.pending) for seq in run}
        while len(run) > least and sum(needs[seq.id] for seq in run) > free:
            victim = run.pop()
            preempt.append(victim)
            free += table.gain(victim)
        spare = free - sum(needs[seq.id] for seq in run)

        # 2. Sequences get rows in order. Drafts are shared evenly among decoding texts, and dropped first if blocks or rows are short.
        drawing = sum(seq.drawing for seq in run)
        room = max(0, self.token_budget - drawing)  # rows left after one for each decoding text
        if waiting or drawing < len(run):
            room //= 2  # drafts never take all rows from prompts
        depths = {seq.id: _depth(seq) for seq in run}
        drafts, drafting = min(self.draft_total, room), sum(depth > 0 for depth in depths.values())
        left, prompts = self.token_budget - drafts, 0
        work: list[Work] = []
        budgets: list[Budget] = []
        admit: list[tuple[Sequence, int]] = []
        others, full = len(run), bool(preempt)  # running sequences without rows yet; whether nobody else is admitted
        for seq in self.order(run, waiting):
            if seq.id in needs:
                others -= 1
                if seq.rerun is not None:
                    if (rerun := seq.rerun.within(self.chunk(left, prompts))) is not None:
                        left -= rerun.cost
                        prompts += 1
                        work.append(Work(seq, 0, rerun=rerun))
                        budgets.append(Budget(0, 0))
                    continue
                pending = seq.pending
                rows = min(pending, seq.sync_point - seq.stored, left if pending == 1 else self.chunk(left, prompts))
                if rows <= 0:
                    continue
                left -= rows
                prompts += pending > 1
                draft, depth = 0, depths[seq.id]
                if depth:
                    draft = min(self.draft_rows, seq.drafts, drafts // drafting)
                    while draft and table.need(seq, rows + draft) - needs[seq.id] > spare:
                        draft //= 2
                    spare -= table.need(seq, rows + draft) - needs[seq.id] if draft else 0
                    drafts, drafting = drafts - draft, drafting - 1
                work.append(Work(seq, rows))
                budgets.append(Budget(draft, depth if draft else 0))
                continue

            # 3. New requests while the whole prompt and one token fit. A request that does not fit blocks those after it.
            left, drafts = left + drafts, 0  # unused draft rows go to new requests
            most = self.chunk(left, prompts)
            full = full or most <= 0 or len(run) + len(admit) == self.max_seqs
            if not full:
                matched, cost = _match(seq, table)
                full = cost > spare - self.reserve([*run, *(one for one, _ in admit), seq], table)
            if full:
                if others:
                    continue
                break
            spare -= cost
            admit.append((seq, matched))
            stored = max(matched, seq.arrives)
            rows = min(len(seq.tokens) - stored, seq.sync_point - stored, most)
            if rows > 0:
                left -= rows
                prompts += 1
                work.append(Work(seq, rows))
                budgets.append(Budget(0, 0))
        return StepPlan(work, budgets, admit, preempt)


def _match(seq: Sequence, table: Pages) -> tuple[int, int]:
    """The tokens of a waiting sequence to attach from the prefix cache, and the blocks that its admission takes."""
    salt = seq.request.salt
    tokens = seq.tokens[: seq.skippable + 1]  # at most all but the last of them match
    matched = table.match(tokens, salt) if len(tokens) > 1 else 0
    cost = table.need(seq, len(seq.tokens) + 1, matched) + (table.idle_matched(tokens, salt) if matched else 0)
    if matched and (alone := table.need(seq, len(seq.tokens) + 1)) < cost:  # the match would cost more copies than it saves
        matched, cost = 0, alone
    return matched, cost


def _depth(seq: Sequence) -> int:
    """The largest depth of a draft: 0 for a prompt in progress, without a drafter or while it rests, and if only one more token fits. A
    constraint drafts also while the drafter rests."""
    asked = seq.drafts and seq.drawing and (seq.constrained or not (seq.rest or seq.fault))
    return max(0, seq.sync_point - len(seq.tokens)) if asked else 0
