"""Draft and target at the same time: the same text, in the time of the slower one."""

from __future__ import annotations

import random

import pytest

from redraft.sim.pearl import parallel, plain, speculative


def target(rows: int) -> float:
    return 1.0 + 0.01 * rows


@pytest.mark.parametrize("gamma", [1, 2, 5])
@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9, 1.0])
def test_every_token_is_committed_once_and_in_order(gamma: int, rate: float) -> None:
    draw = random.Random(gamma)
    accepts = [draw.random() < rate for _ in range(200)]
    for run in (plain(accepts, target), speculative(accepts, gamma, 0.2, target), parallel(accepts, gamma, 0.2, target)):
        assert run.places == list(range(200))


def test_nobody_waits_while_all_is_accepted() -> None:
    found = parallel([True] * 401, 4, 0.25, target)
    assert found.seconds == pytest.approx(target(1) + 100 * target(4))


def test_a_rejection_costs_the_block() -> None:
    accepts = [True, True, False, True, True, True, True]  # block of 4: first, then 3 and the next; fails; then from the start
    found = parallel(accepts, 4, 0.1, target)
    assert found.seconds == pytest.approx(target(1) + target(4) + target(1) + target(4))


def test_without_accepted_drafts_it_is_plain_decoding() -> None:
    assert parallel([False] * 50, 3, 0.2, target).seconds == pytest.approx(plain([False] * 50, target).seconds)
