"""Drafts stay within a limit of memory: what they take is predicted, they shrink to nothing, and no limit changes a text."""

from __future__ import annotations

import tracemalloc
from random import Random
from typing import Any

import pytest

from redraft import LLM, SamplingParams
from redraft.core.plan import Budget, StepPlan, Work
from redraft.core.sequence import Request, Sequence
from redraft.core.tree import EMPTY
from redraft.kv.table import PageTable
from redraft.ops import library
from redraft.sched.draft_memory import DraftMemory
from tests.contracts.identity import SAMPLING, drafter, drive, engine, expected, prompts

ROW, BLOCK = 400, 2000


def world(stored: list[int]) -> tuple[list[Work], PageTable]:
    """Decoding texts with so many stored tokens each."""
    table, works = PageTable(64, 2, 1), []
    for i, count in enumerate(stored):
        request = Request(str(i), [1] * count, SamplingParams())
        seq = Sequence(i, request, 0, [1] * (count + 1), count, 0, 1 << 20)
        table.open(seq)
        work = [Work(seq, count)]
        table.reserve(work, [EMPTY])
        seq.stored = count
        table.discard(seq)
        seq.stored = 0
        works.append(seq)
    return [Work(seq, 1) for seq in works], table


@pytest.mark.parametrize("logits", [False, True])
def test_a_plan_keeps_the_limit(logits: bool) -> None:
    dice = Random(1)
    for _ in range(200):
        work, table = world([dice.randrange(1, 70) for _ in range(dice.randrange(1, 5))])
        plan = StepPlan(work, [Budget(rows, 9) if (rows := dice.choice([0, 1, 5, 16, 70])) else Budget(0, 0) for _ in work])
        memory = DraftMemory(dice.choice([0, 7, 500, 3000, 20_000, 1 << 30]), ROW, BLOCK)
        cut = memory.cut(plan, table, logits=logits)
        sizes = [budget.rows for budget in cut.budgets]
        assert memory.predict(work, sizes, table, logits=logits) <= memory.limit
        assert cut.work == work and all(a.rows <= b.rows for a, b in zip(cut.budgets, plan.budgets, strict=True))
        assert all(budget.depth == 0 for budget in cut.budgets if not budget.rows)
        assert memory.limit != 1 << 30 or cut.budgets == plan.budgets


def test_the_largest_draft_that_fits() -> None:
    work, table = world([10])
    plan = StepPlan(work, [Budget(16, 9)])
    for limit, rows in ((0, 0), (ROW + 7, 0), (ROW + 8, 1), (16 * (ROW + 8) - 1, 15), (16 * (ROW + 8), 16)):
        assert DraftMemory(limit, ROW, BLOCK).cut(plan, table, logits=True).budgets[0].rows == rows
    assert DraftMemory(16 * 8, ROW, BLOCK).cut(plan, table, logits=False).budgets[0].rows == 16, "nothing reads logits"


@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
def test_no_limit_changes_a_text(sampling: str) -> None:
    drafted = []
    for limit in (0, 3000, 1 << 30):
        truth = {str(i): list(expected(None, prompt, sampling, 100 + i)) for i, prompt in enumerate(prompts()[:3])}
        made = engine(drafter("oracle", {(name, 0): text for name, text in truth.items()}), draft_memory=limit)
        asked = [Request(str(i), list(prompt), SAMPLING[sampling].but(seed=100 + i)) for i, prompt in enumerate(prompts()[:3])]
        seen = drive(made, asked, [0, 0, 1])
        assert seen.texts == truth
        drafted.append(seen.accepted + seen.rejected)
    assert drafted[0] == 0 < drafted[1] < drafted[2]


@pytest.mark.skipif(not library.PATH.exists() or library.load() is None, reason="NumPy's backend makes logits that nothing reads")
def test_the_peak_of_a_step_is_predicted() -> None:
    """Within a tenth, of what the drafts of a step add to the arrays of the step without any."""
    added: dict[int, list[tuple[int, int]]] = {}
    for limit in (0, 300_000, 1 << 30):
        llm = LLM("embedded", backend="native", draft="token-recycling", threads=1, draft_total=64, max_model_len=256, draft_memory=limit)
        own, meter, found, before = llm.engine, DraftMemory(0, 4 * llm.spec.vocab, 0), added.setdefault(limit, []), [0]
        begin, end = own.begin, own.end

        def begun(*given: Any, begin: Any = begin, before: list[int] = before) -> Any:
            tracemalloc.reset_peak()
            before[0] = tracemalloc.get_traced_memory()[0]
            return begin(*given)

        def ended(
            step: Any, *rest: Any, end: Any = end, before: list[int] = before, found: Any = found, meter: Any = meter, own: Any = own
        ) -> Any:
            sizes = [len(tree) for tree in step.trees]
            predicted = meter.predict(step.plan.work, sizes, own.memory, logits=step.taps.logits)
            events = end(step, *rest)
            if len(sizes) == 4 and all(work.rows == 1 for work in step.plan.work):
                found.append((predicted, tracemalloc.get_traced_memory()[1] - before[0]))
            return events

        own.begin, own.end = begun, ended  # type: ignore[method-assign]
        for traced in (False, True):  # the first run makes what the engine keeps
            found.clear()
            if traced:
                tracemalloc.start()
            llm.generate(
                ["def push(self, item):\n    self.items.append(item)\n\n"] * 4, SamplingParams(temperature=0.5, seed=1, max_tokens=24)
            )
        tracemalloc.stop()
    bare = max(peak for _, peak in added[0])
    assert all(predicted == 0 for predicted, _ in added[0])
    for limit in (300_000, 1 << 30):
        assert max(predicted for predicted, _ in added[limit]) > min(limit, 400_000) / 2
        assert all(predicted <= limit for predicted, _ in added[limit])
        for predicted, peak in added[limit]:
            assert peak - bare == pytest.approx(predicted, rel=0.1)
