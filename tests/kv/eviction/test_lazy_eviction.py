"""LazyEviction against a plain simulation of its steps, row by row."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
from hypothesis import given as drawn
from hypothesis import settings

from redraft.kv.eviction.lazy_eviction import LazyEviction
from tests.kv.eviction import LANES, Drive, given, grouped, one_by_one, runner

SMALL = LazyEviction(budget=20, window=8)


def opened(method: LazyEviction = SMALL) -> Any:
    return method.open(runner())


def plain(context: int, length: int, long: bool = True) -> dict[int, list[list[int]]]:
    """Positions after each decision. Per slot: the last row that activated it, and the longest interval."""
    lanes: list[dict[int, tuple[int, int]]] = [{} for _ in range(LANES)]
    first, found = (context if context > 20 else 28), {}
    for row in range(length):
        for i, lane in enumerate(lanes):
            lane[row] = row, 0
            for slot, (last, interval) in list(lane.items()):
                if row >= first - 8 and given("above", i, row, slot):
                    lane[slot] = row, max(interval, row - last)
        stored = row + 1
        if stored >= first and (stored - first) % 8 == 0:
            for i, lane in enumerate(lanes):

                def score(slot: int, lane: dict[int, tuple[int, int]] = lane, row: int = row) -> float:
                    last, interval = lane[slot]
                    if not interval:
                        return 0.0
                    return 2 / (1 + math.exp((row - last) / interval)) + long * 2 / (1 + math.exp(1 / interval))

                newest = sorted(lane)[-8:]
                best = sorted(sorted(lane)[:-8], key=lambda slot: (score(slot), slot), reverse=True)[:12]
                lanes[i] = {slot: lane[slot] for slot in sorted([*best, *newest])}
            found[stored] = [sorted(lane) for lane in lanes]
    return found


@settings(max_examples=15, deadline=None)
@drawn(st.integers(0, 1 << 20), st.booleans(), st.sampled_from([3, 20, 40]), st.booleans())
def test_decisions_are_those_of_the_plain_simulation(seed: int, drafting: bool, context: int, long: bool) -> None:
    policy = opened(LazyEviction(20, 8, long=long))
    drive = Drive(policy, context=context).run(grouped(policy, 80, seed, drafting, context))
    assert drive.kept == plain(context, drive.seq.stored, long) and len(drive.kept) > 4
    assert all(len(lane) == 20 for lanes in drive.kept.values() for lane in lanes)
    assert drive.longest <= max(context, policy.onset(context).longest)


def test_a_slot_of_every_row_has_interval_one_and_the_more_recent_of_two_wins() -> None:
    policy = opened()
    score = policy.score(np.array([0, 5, 9, 3]), np.array([1, 10, 10, 0]))
    assert score[0] == 1 + 2 / (1 + math.e) and score[1] > score[2] and score[3] == 0


def test_a_fork_goes_its_own_way() -> None:
    policy = opened()
    parent = Drive(policy, context=30).run(one_by_one(36))
    child = parent.fork(2).run(one_by_one(30), salt=5)
    assert parent.run(one_by_one(30)).kept == plain(30, 66)
    assert child.kept[62] != parent.kept[62]
