"""H2O against a plain simulation of its steps."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import given as drawn
from hypothesis import settings

from redraft.core.sequence import NEVER
from redraft.kv.eviction.h2o import H2O
from tests.kv.eviction import LANES, Drive, given, grouped, one_by_one, runner

SMALL = H2O(budget=12, newest=0.5, drop=5)


def opened(method: H2O = SMALL) -> Any:
    return method.open(runner())


def plain(context: int, length: int) -> dict[int, list[list[int]]]:
    """Positions after each decision; every row from the first on counts."""
    lanes: list[list[int]] = [[] for _ in range(LANES)]
    sums: list[dict[int, int]] = [{} for _ in range(LANES)]
    found = {}
    first = context if context > 12 else 12 + 5
    for stored in range(1, length + 1):
        for i, lane in enumerate(lanes):
            lane.append(stored - 1)
            for j in lane:
                sums[i][j] = sums[i].get(j, 0) + given("mass", i, stored - 1, j)
        if stored >= first and (stored - first) % 5 == 0:
            for i, lane in enumerate(lanes):
                newest = lane[-6:]
                best = sorted(lane[:-6], key=lambda j: (sums[i][j], j), reverse=True)[:6]
                lanes[i] = sorted([*best, *newest])
            found[stored] = [list(lane) for lane in lanes]
    return found


@settings(max_examples=12, deadline=None)
@drawn(st.integers(0, 1 << 20), st.booleans(), st.sampled_from([3, 12, 30]))
def test_decisions_are_those_of_the_plain_simulation(seed: int, drafting: bool, context: int) -> None:
    policy = opened()
    drive = Drive(policy, context=context).run(grouped(policy, 60, seed, drafting, context))
    assert drive.kept == plain(context, drive.seq.stored) and len(drive.kept) > 4
    assert drive.longest <= max(context, policy.onset(context).longest)


def test_every_row_of_the_context_runs() -> None:
    onset = opened().onset(30)
    assert (onset.at, onset.shareable, onset.skippable, onset.slots, onset.most) == (30, 30, 0, 12, 17)


def test_a_budget_of_all_does_nothing() -> None:
    policy = opened(H2O(budget=4096))
    assert policy.onset(30).at == 4096 + 64 and opened(H2O(budget=1.0)).onset(30) != NEVER
    assert Drive(policy, context=30).run(one_by_one(60)).kept == {}


def test_a_fork_goes_its_own_way() -> None:
    policy = opened()
    parent = Drive(policy, context=20).run(one_by_one(24))
    child = parent.fork(2).run(one_by_one(30), salt=5)
    assert parent.run(one_by_one(30)).kept == plain(20, 54)
    assert (child.seq.state[policy].sums != parent.seq.state[policy].sums).any()
