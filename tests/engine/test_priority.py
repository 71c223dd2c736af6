"""More urgent requests, then earlier ones, are admitted first and preempted last. No text depends on it."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from redraft.core.sequence import Request
from redraft.engine.engine import Engine
from redraft.engine.output import checked
from tests.contracts.identity import engine
from tests.engine.spelling import PROMPT, truth
from tests.engine.test_plugins import SAMPLED

TEXTS = {str(i): truth(SAMPLED, PROMPT[i:], new=30) for i in range(8)}


def watched(made: Engine) -> tuple[list[str], list[str]]:
    """Ids in the order of admission and of preemption, as they come."""
    admitted: list[str] = []
    preempted: list[str] = []
    right = made.enact

    def enact(plan: Any) -> Any:
        for victim in plan.preempt:
            others = [seq for seq in made.running if seq not in plan.preempt]
            assert all(_rank(seq) <= _rank(victim) for seq in others), "a more urgent or an earlier one was preempted"
        preempted.extend(seq.request.id for seq in plan.preempt)
        admitted.extend(seq.request.id for seq, _ in plan.admit)
        ran = right(plan)
        for seqs in (list(made.waiting), made.running):
            assert [_rank(seq) for seq in seqs] == sorted(_rank(seq) for seq in seqs)
        return ran

    made.enact = enact  # type: ignore[method-assign]
    return admitted, preempted


def _rank(seq: Any) -> tuple[int, int]:
    return seq.request.priority, seq.id


def texts(made: Engine, arrivals: list[tuple[int, Request]]) -> dict[str, list[int]]:
    reported: dict[str, list[int]] = {}
    left, step = sorted(arrivals, key=lambda one: one[0]), 0
    while left or made.has_work:
        while left and left[0][0] <= step:
            made.add(left.pop(0)[1])
        for event in checked(made.step()):
            reported.setdefault(event.request.id, []).extend(event.tokens)
        made.memory.check()
        step += 1
        assert step < 3000
    assert made.memory.used() == 0
    return reported


@pytest.mark.parametrize(
    ("scheduler", "order"), [("sarathi", "250413"), ("fcfs", "250413"), ("piggyback", "250413"), ("spf:gamma=0", "524031")]
)
def test_the_most_urgent_is_admitted_first(scheduler: str, order: str) -> None:
    made = engine(max_seqs=1, scheduler=scheduler)
    admitted, _ = watched(made)
    requests = [Request(str(i), PROMPT[i:], SAMPLED, priority=p) for i, p in enumerate([0, 5, -1, 5, 0, -1])]
    assert texts(made, [(0, one) for one in requests]) == {str(i): TEXTS[str(i)] for i in range(6)}
    assert "".join(admitted) == order


def test_the_least_urgent_gives_its_pages_back() -> None:
    made = engine(pool=4)
    admitted, preempted = watched(made)
    low, high = Request("0", PROMPT, SAMPLED, priority=3), [Request(str(i), PROMPT[i:], SAMPLED) for i in (1, 2)]
    found = texts(made, [(0, low), (2, high[0]), (4, high[1])])
    assert found == {str(i): TEXTS[str(i)] for i in range(3)}
    assert preempted and set(preempted) == {"0"} and admitted[:3] == ["0", "1", "2"]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scheduler", ["sarathi", "fcfs"])
def test_always(seed: int, scheduler: str) -> None:
    dice = Random(seed)
    made = engine("token-recycling", pool=4, chunk=dice.choice([60, 512]), scheduler=scheduler)
    _, preempted = watched(made)
    requests = [(dice.randrange(4), Request(str(i), PROMPT[i:], SAMPLED, priority=dice.randrange(-1, 2))) for i in range(8)]
    assert texts(made, requests) == TEXTS
    assert preempted
