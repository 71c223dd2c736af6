"""Plans over random states of a real page table: without side effects, within budgets, fair, and never out of pages."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft import registry
from redraft.config import SamplingParams
from redraft.core.plan import Accepted, StepPlan, Work
from redraft.core.sequence import CachePlan, Lanes, Request, Sequence
from redraft.core.tree import EMPTY, TokenTree
from redraft.errors import InvalidInput
from redraft.kv.table import PageTable
from redraft.sched.scheduler import Scheduler

SCHEDULERS = sorted(registry.METHODS["sched"])


def scheduler(name: str = "sarathi", **options: object) -> Scheduler:
    return registry.create("sched", name, **options)


@dataclass
class World:
    """Carries out plans like an engine, without a model: every text draws zeros and accepts part of each draft."""

    scheduler: Scheduler
    table: PageTable
    seed: int = 0
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)
    preempted: int = 0
    made: int = 0
    now: float = 0.0  # a step takes a second

    def add(self, prompt: int, new: int, lanes: Lanes = Lanes.SHARED, salt: str = "") -> Sequence:
        self.made += 1
        tokens = [self.made % 7] * prompt
        request = Request(str(self.made), tokens, SamplingParams(max_tokens=new), salt)
        seq = Sequence(self.made, request, 0, list(tokens), prompt, 0, prompt + new - 1, cache=CachePlan(lanes=lanes))
        request.sequences.append(seq)
        request.arrived = self.now
        self.waiting.append(seq)
        return seq

    def plan(self) -> StepPlan:
        return self.scheduler.plan(self.waiting, self.running, self.table)

    def step(self) -> StepPlan:
        plan, ordered = self.plan(), list(self.scheduler.order(self.running, self.waiting))
        assert [seq for seq, _ in plan.admit] == [seq for seq in ordered if seq in self.waiting][: len(plan.admit)], (
            "admission out of order"
        )
        for seq in plan.preempt:
            self.running.remove(seq)
            self.table.free(seq)
            seq.stored = 0
            self.waiting.appendleft(seq)
            self.preempted += 1
        for seq, matched in plan.admit:
            self.waiting.remove(seq)
            self.table.open(seq)
            self.table.attach(seq, matched)
            self.running.append(seq)
        dice = Random(f"{self.seed} {self.made} {sum(len(s.tokens) for s in self.running)}")
        trees = [self.draft(b.rows, b.depth, dice) for b in plan.budgets]
        self.table.reserve(plan.work, trees)
        self.table.check()
        accepted = [self.accept(w, t, dice) for w, t in zip(plan.work, trees, strict=True)]
        self.table.commit(plan.work, accepted)
        for seq in plan.seqs:
            self.table.publish(seq)
            assert seq.stored <= seq.sync_point
            if seq.generated == seq.params.max_tokens:
                self.running.remove(seq)
                self.table.free(seq)
                self.finished.append(seq)
        self.table.check()
        self.now += 1
        return plan

    @staticmethod
    def draft(rows: int, depth: int, dice: Random) -> TokenTree:
        parents = [dice.randrange(-1, i) for i in range(dice.randint(rows // 2, rows))]
        return TokenTree.build(list(range(len(parents))), parents, vocab=1000, rows=rows, depth=depth) if depth else EMPTY

    @staticmethod
    def accept(work: Work, tree: TokenTree, dice: Random) -> Accepted:
        if not work.done:
            return Accepted()
        path = tree.path_to(dice.randrange(-1, len(tree)))
        return Accepted(tuple(path), (1,) * (len(path) + 1))


def world(name: str = "sarathi", blocks: int = 40, **options: object) -> World:
    return World(scheduler(name, **options), PageTable(blocks, 2, 2))


def check_plan(plan: StepPlan, at: World, running: list[Sequence]) -> None:
    rules = at.scheduler
    rows = sum(w.rows for w in plan.work) + sum(b.rows for b in plan.budgets)
    assert rows <= rules.token_budget
    assert sum(b.rows for b in plan.budgets) <= rules.draft_total
    assert len(running) - len(plan.preempt) + len(plan.admit) <= rules.max_seqs
    assert len({w.seq.id for w in plan.work}) == len(plan.work) == len(plan.budgets)
    for w, budget in zip(plan.work, plan.budgets, strict=True):
        assert w.rows > 0 and w.seq not in plan.preempt
        assert 0 <= budget.rows <= rules.draft_rows
        if budget.rows:
            assert w.done and 0 < budget.depth <= w.seq.sync_point - len(w.seq.tokens)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_sequence_is_ordered_once_and_those_that_draw_come_before_those_that_wait(name: str) -> None:
    at = world(name, blocks=12, token_budget=40, max_seqs=6)
    for i in range(9):
        at.add(20 + 13 * i % 70, 30)
    for _ in range(40):
        ordered = list(at.scheduler.order(at.running, at.waiting))
        assert sorted(seq.id for seq in ordered) == sorted(seq.id for seq in (*at.running, *at.waiting))
        waits = [seq in at.waiting for seq in ordered]
        behind = ordered[waits.index(True) :] if True in waits else []
        assert not any(seq.pending == 1 for seq in behind if seq in at.running)
        at.step()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_plan_changes_nothing_and_is_repeatable(name: str) -> None:
    at = world(name, blocks=12, token_budget=40, max_seqs=6)
    for i in range(9):
        at.add(20 + 13 * i % 70, 30)
    for _ in range(40):
        state = (copy.deepcopy(at.table.__dict__), [(s.id, s.stored, list(s.tokens)) for s in (*at.waiting, *at.running)])
        first, second = at.plan(), at.plan()
        assert first == second
        assert [(s.id, s.stored, list(s.tokens)) for s in (*at.waiting, *at.running)] == state[1]
        assert at.table.available() == len(state[0]["_free"]) + len(state[0]["prefix"].idle)
        at.table.check()
        at.step()


@pytest.mark.parametrize("name", SCHEDULERS)
@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 120), st.integers(1, 60), st.integers(0, 30), st.sampled_from(Lanes)), min_size=1, max_size=12
    ),
    blocks=st.integers(7, 24),
    max_seqs=st.integers(1, 8),
    spare_rows=st.integers(0, 60),
    draft=st.tuples(st.integers(0, 40), st.integers(0, 80)),
    seed=st.integers(0, 99),
)
def test_everyone_finishes_within_all_budgets(
    name: str, requests: list[tuple[int, int, int, Lanes]], blocks: int, max_seqs: int, spare_rows: int, draft: tuple[int, int], seed: int
) -> None:
    rules = {"token_budget": max_seqs + spare_rows, "max_seqs": max_seqs, "draft_rows": draft[0], "draft_total": draft[1]}
    at = world(name, blocks, **rules)
    at.seed = seed
    arriving = sorted(enumerate(requests), key=lambda entry: entry[1][2])
    steps = 0
    while arriving or at.waiting or at.running:
        while arriving and arriving[0][1][2] <= steps:
            _, (prompt, new, _, lanes) = arriving.pop(0)
            at.add(prompt, new, lanes)
        running = list(at.running)
        check_plan(at.plan(), at, running)
        plan = at.step()  # raises OutOfPages if the plan exceeds the pool
        assert plan.work or not (running or at.waiting), "a step without work"
        steps += 1
        assert steps < 20_000, "no end in sight"
    assert len(at.finished) == len(requests) and at.table.used() == 0


@pytest.mark.parametrize("name", ["sarathi", "spf", "piggyback"])
def test_a_text_in_progress_never_stalls(name: str) -> None:
    at = world(name, token_budget=16, max_seqs=8, draft_rows=4, draft_total=8)
    for _ in range(3):
        at.add(3, 40)
    at.step()
    for _ in range(3):
        at.add(90, 5)
    while at.waiting or len(at.running) > 3:
        drawing = {seq.id for seq in at.running if seq.pending == 1}
        plan = at.step()
        assert drawing <= {w.seq.id for w in plan.work}
    assert len(at.finished) >= 3


def test_prompts_move_although_others_draft() -> None:
    at = world(token_budget=24, max_seqs=8, draft_rows=80, draft_total=160)
    at.add(10, 60)
    at.step()
    late = at.add(60, 5)
    for _ in range(12):
        at.step()
    assert late.generated, "drafts took the rows of a prompt"


def test_unused_draft_rows_go_to_new_requests() -> None:
    at = world(token_budget=16, max_seqs=8, draft_rows=2, draft_total=8)
    at.add(10, 60)
    at.step()
    at.add(60, 5)
    plan = at.plan()
    assert [(work.rows, budget.rows) for work, budget in zip(plan.work, plan.budgets, strict=True)] == [(1, 2), (13, 0)]


def test_fcfs_serves_in_arrival_order() -> None:
    at = world("fcfs", token_budget=16, max_seqs=4, draft_total=0)
    first = at.add(60, 5)
    second = at.add(4, 5)
    plan = at.step()
    assert [(w.seq, w.rows) for w in plan.work] == [(first, 16)]
    at.step()
    assert second not in at.running
    while first.pending > 1:
        at.step()
    assert at.step().seqs[0] is first


def test_sarathi_lets_texts_go_before_prompts() -> None:
    at = world("sarathi", token_budget=16, max_seqs=4, draft_total=0)
    at.add(4, 9)
    at.step()
    at.add(60, 5)
    plan = at.step()
    assert [w.rows for w in plan.work] == [1, 15]


def test_drafts_are_given_up_before_anyone_is_preempted() -> None:
    at = world(blocks=4, draft_rows=32, draft_total=64)
    at.scheduler = scheduler(draft_rows=32, draft_total=64, watermark=0.0)
    at.add(30, 30)
    at.add(31, 30)
    at.step()
    assert at.table.available() == 2
    for _ in range(4):
        plan = at.plan()
        assert not plan.preempt
        # the free blocks are just enough for the next page of both texts: no draft may take them
        assert sum(at.table.need(w.seq, w.rows + b.rows) for w, b in zip(plan.work, plan.budgets, strict=True)) <= at.table.available()
        at.step()
    wide = world(blocks=40, draft_rows=32, draft_total=64)
    wide.add(30, 30)
    wide.add(31, 30)
    wide.step()
    assert sum(b.rows for b in wide.plan().budgets) > 40, "with room, drafts are wide"


def test_the_last_to_arrive_is_preempted_and_waits_in_front() -> None:
    at = world(blocks=4, draft_total=0)
    seqs = [at.add(31, 40) for _ in range(4)]
    for seq in seqs:
        seq.request.salt = str(seq.id)  # nothing to share
    at.step()
    while not at.preempted:
        at.step()
    assert at.running == seqs[:2] and list(at.waiting) == seqs[2:]


def test_the_head_of_the_queue_blocks_and_the_watermark_is_left() -> None:
    at = world(blocks=10, draft_total=0)
    at.scheduler = scheduler(draft_total=0, watermark=0.3)
    big, small = at.add(32 * 9, 5), at.add(5, 5)
    plan = at.plan()
    assert [seq for seq, _ in plan.admit] == [big], "an empty engine admits what fits at all"
    at.waiting.clear()
    first, second = at.add(32 * 6, 5), at.add(32 * 2, 5)
    small = at.add(5, 5)
    plan = at.plan()
    assert [seq for seq, _ in plan.admit] == [first]
    assert second not in plan.seqs and small not in plan.seqs


def test_a_matched_prefix_is_not_paid_twice() -> None:
    at = world(blocks=6, draft_total=0)
    at.add(100, 3)
    tokens = list(at.waiting[0].tokens)
    while at.waiting or at.running:
        at.step()
    again = at.add(100, 3)
    again.tokens[:] = again.request.prompt[:] = tokens
    plan = at.plan()
    assert plan.admit == [(again, 96)] and plan.work[0].rows == 4


def test_what_arrives_from_another_engine_needs_memory_but_no_rows() -> None:
    world = World(scheduler(token_budget=8, max_seqs=8), PageTable(4, 1, 1))
    seq = world.add(70, 10)
    assert world.plan().work[0].rows == 8
    seq.arrives = 69
    assert world.plan().work == [Work(seq, 1)]
    world.table = PageTable(2, 1, 1)
    assert not world.plan().admit


def test_a_budget_that_would_stall_texts_is_refused() -> None:
    with pytest.raises(InvalidInput, match="token_budget = 4 is less than max_seqs = 8"):
        scheduler(token_budget=4, max_seqs=8)


@pytest.mark.parametrize(("texts", "drafts"), [(1, 16), (2, 32), (3, 32), (20, 32), (33, 32), (40, 32)])
def test_drafts_are_shared_without_a_cliff(texts: int, drafts: int) -> None:
    """draft_total is used completely and shared evenly, for any number of decoding texts."""
    made = world(blocks=200, token_budget=512, max_seqs=64, draft_rows=16, draft_total=32)
    for _ in range(texts):
        made.add(4, 40)
    made.step()
    budgets = [budget.rows for budget in made.plan().budgets]
    assert len(budgets) == texts
    assert sum(budgets) == drafts
    assert max(budgets) - min(budgets) <= 1
