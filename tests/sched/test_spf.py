from __future__ import annotations

import pytest

from redraft.core.sequence import Sequence
from redraft.errors import InvalidInput
from tests.sched.test_scheduler import World, scheduler, world


def firsts(at: World, seqs: list[Sequence]) -> list[int]:
    """Ids in the order in which the texts draw their first token."""
    found: list[int] = []
    while len(found) < len(seqs):
        at.step()
        found += [seq.id for seq in seqs if seq.generated and seq.id not in found]
    return found


def added(at: World, *prompts: tuple[int, float]) -> list[Sequence]:
    """Requests of (length, time of arrival) that wait now."""
    seqs = [at.add(length, 2) for length, _ in prompts]
    for seq, (_, arrived) in zip(seqs, prompts, strict=True):
        seq.request.arrived = arrived
    return seqs


@pytest.mark.parametrize(("gamma", "order"), [("0", [4, 2, 3, 1]), ("5", [2, 4, 1, 3]), ("15", [2, 1, 4, 3]), ("1e9", [1, 2, 3, 4])])
def test_remaining_tokens_less_gamma_times_the_wait(gamma: str, order: list[int]) -> None:
    at = world(f"spf:gamma={gamma}", blocks=60, token_budget=16, max_seqs=1, draft_total=0)
    seqs = added(at, (80, 0), (30, 1), (64, 6), (17, 7))
    assert firsts(at, seqs) == order


def test_equal_prompts_are_served_in_order_of_arrival() -> None:
    for gamma in ("0", "15"):
        at = world(f"spf:gamma={gamma}", blocks=60, token_budget=16, max_seqs=4, draft_total=0)
        assert firsts(at, added(at, (40, 0), (40, 0), (40, 0))) == [1, 2, 3]


def test_a_short_prompt_passes_a_long_one_that_has_begun() -> None:
    at = world("spf:gamma=0", blocks=60, token_budget=16, max_seqs=4, draft_total=0)
    (long,) = added(at, (200, 0))
    at.step()
    (short,) = added(at, (20, 1))
    assert [work.seq for work in at.step().work] == [short]
    assert [(work.seq, work.rows) for work in at.step().work] == [(short, 4), (long, 12)]
    assert [(work.seq, work.rows) for work in at.step().work] == [(short, 1), (long, 15)]


def test_a_prompt_that_has_little_left_is_not_passed() -> None:
    at = world("spf:gamma=0", blocks=60, token_budget=16, max_seqs=4, draft_total=0)
    (long,) = added(at, (36, 0))
    at.step()
    added(at, (20, 1))
    assert at.step().work[0].seq is long


def test_the_head_of_the_queue_blocks_also_before_prompts_in_progress() -> None:
    at = world("spf:gamma=100", blocks=12, token_budget=16, max_seqs=4, draft_total=0)
    late, big, small = added(at, (200, 9), (170, 1), (10, 3))
    for seq in (big, small):
        at.waiting.remove(seq)
    at.step()
    at.waiting.extend([big, small])
    assert list(at.scheduler.order(at.running, at.waiting)) == [big, small, late]
    plan = at.plan()
    assert plan.admit == [] and plan.seqs == [late]


def test_a_priority_precedes_a_score() -> None:
    at = world("spf:gamma=15", blocks=60, token_budget=16, max_seqs=1, draft_total=0)
    seqs = added(at, (10, 0), (90, 3))
    seqs[1].request.priority = -1
    assert firsts(at, seqs) == [2, 1]


@pytest.mark.parametrize(("gamma", "limit"), [("2", 220), ("0", None)])
def test_with_ageing_nobody_starves(gamma: str, limit: int | None) -> None:
    """Twice the prompts arrive that fit. One of 200 tokens waits only for those that arrive within 200 / gamma = 100 steps."""
    at = world(f"spf:gamma={gamma}", blocks=60, token_budget=16, max_seqs=8, draft_total=0)
    long = at.add(200, 2)
    while not long.generated and at.now < 400:
        for _ in range(2):
            at.add(16, 1)
        at.step()
    assert at.now < limit if limit else not long.generated


def test_a_gamma_below_zero_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"spf:gamma=-1\.0: must be 0 or more"):
        scheduler("spf:gamma=-1")
