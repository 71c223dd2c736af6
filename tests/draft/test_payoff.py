"""A drafter that loses is stopped, tried again, and its pauses grow; one that pays goes on."""

from __future__ import annotations

import numpy as np
import pytest

from redraft.core.tree import EMPTY, TokenTree
from redraft.draft.payoff import CREDIT, LONGEST_PAUSE, PATIENCE, PAUSE, Payoff, Prices

TOKEN = 1.0  # the time of a plain step


def drafted(*origins: int) -> TokenTree:
    n = len(origins)
    return TokenTree(
        np.arange(n, dtype=np.int32), np.full(n, -1, np.int32), np.zeros(n + 1, np.uint8), origins=np.array(origins, np.uint16)
    )


def test_a_drafter_that_loses_is_stopped_and_its_pauses_double() -> None:
    payoff = Payoff(2)
    pauses, lost = [], 0.0
    paused = 0
    for _ in range(5000):
        if 1 in payoff.active():
            if paused:
                pauses.append(paused)
                paused = 0
            payoff.add(drafted(0, 1), (0,), Prices(TOKEN, 0.2, 0.0))
            lost += 0.2
        else:
            paused += 1
            assert payoff.stopped == [1]
            payoff.add(drafted(0), (0,), Prices(TOKEN, 0.2, 0.0))
        assert 0 in payoff.active()
    assert pauses[:5] == [PAUSE, 2 * PAUSE, 4 * PAUSE, 8 * PAUSE, 16 * PAUSE] and max(pauses) == LONGEST_PAUSE
    assert lost < 0.01 * 5000 * TOKEN + 6, "it loses a few steps at first, then a percent"


def test_drafting_time_counts_even_if_it_is_small_and_nothing_is_drafted() -> None:
    payoff = Payoff(2)
    lost = 0.0
    for _ in range(100_000):
        lost += 0.01 if payoff.active() else 0.0
        payoff.add(EMPTY, (), Prices(TOKEN, 0.0, 0.01 if payoff.active() else 0.0))
    assert lost < 0.006 * 100_000, "it stops after 100 steps for 256"


def test_gains_count_up_to_a_limit_and_shorten_the_pauses() -> None:
    payoff = Payoff(1)
    for length in (PAUSE, 2 * PAUSE, PAUSE):
        if length == PAUSE:  # in the second round it gained nothing
            for _ in range(1000):
                payoff.add(drafted(0), (0,), Prices(TOKEN, 0.3, 0.0))
        steps = 0
        while payoff.active():
            payoff.add(drafted(0), (), Prices(TOKEN, 0.3, 0.0))
            steps += 1
        assert steps <= (CREDIT + PATIENCE) / 0.3 + 2
        while not payoff.active():
            payoff.add(EMPTY, (), Prices(TOKEN, 0.0, 0.0))
            length -= 1
        assert length == 0


def test_the_debt_that_it_may_have_halves_twice() -> None:
    payoff = Payoff(1)
    debts = []
    for _ in range(4):
        debt = 0.0
        while payoff.active():
            payoff.add(drafted(0), (), Prices(TOKEN, 0.001, 0.0))
            debt += 0.001
        debts.append(debt)
        payoff.add(EMPTY, (), Prices(TOKEN, 0.0, 0.0), payoff.wait)
        assert payoff.wait == 0
    assert debts == pytest.approx([PATIENCE, PATIENCE / 2, PATIENCE / 4, PATIENCE / 4], abs=0.003)


def test_it_comes_back_if_it_pays_again() -> None:
    payoff = Payoff(1)
    while payoff.active():
        payoff.add(drafted(0), (), Prices(TOKEN, 0.3, 0.0))
    for _ in range(PAUSE):
        assert not payoff.active()
        payoff.add(EMPTY, (), Prices(TOKEN, 0.0, 0.0))
    for _ in range(200):
        assert payoff.active() == (0,)
        payoff.add(drafted(0), (0,), Prices(TOKEN, 0.3, 0.0))
