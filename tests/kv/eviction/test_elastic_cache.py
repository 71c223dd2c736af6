"""Elastic Cache against its numbered steps."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest

from redraft.core.sequence import NEVER
from redraft.kv.eviction.elastic_cache import ElasticCache
from tests.kv.eviction import HEADS, LANES, Drive, one_by_one, runner
from tests.kv.eviction.merging import SIZE, contents, decide, walk

CONTEXT = 40
SMALL = ElasticCache(budget=0.4, distance=3, drop=4)


def test_each_dropped_token_is_in_the_mean_of_the_nearest_kept_one() -> None:
    found = decide(SMALL, CONTEXT, walk(CONTEXT, 1), walk(CONTEXT, 2))
    for lane, slots in enumerate(found.kept.slots):
        layer = slice(lane // HEADS * HEADS, lane // HEADS * HEADS + HEADS)
        mass = found.sums[0, layer].mean(0)
        best = sorted(range(1, CONTEXT - 1), key=lambda j: (mass[j], j), reverse=True)[: ceil(0.4 * CONTEXT) - 2]
        assert slots.tolist() == sorted([0, *best, CONTEXT - 1])
        members: dict[int, list[int]] = {0: [0], CONTEXT - 1: [CONTEXT - 1]}
        for j in range(1, CONTEXT - 1):
            members.setdefault(min(slots[1:-1].tolist(), key=lambda k: (abs(k - j), k)), []).append(j)
        assert sum(map(len, members.values())) == CONTEXT
        for part, given in zip(contents(found, lane), (found.keys, found.values), strict=True):
            assert part == pytest.approx(np.stack([given[lane, members[slot]].mean(0) for slot in slots.tolist()]), abs=1e-5)


def test_merging_equals_changes_nothing() -> None:
    one = np.broadcast_to(np.float32(0.37), (LANES, CONTEXT, SIZE)).copy()
    found = decide(SMALL, CONTEXT, one, one)
    assert found.kept.merged is not None and (found.kept.merged.keys == one[0, 0]).all()


def test_later_slots_are_those_of_dropping_one_by_one() -> None:
    policy = ElasticCache(budget=0.4, distance=3, drop=4, merge=False).open(runner())
    drive = Drive(policy, context=CONTEXT).run(one_by_one(70))
    kept = ceil(0.4 * CONTEXT)
    lane = list(drive.kept[CONTEXT][0])
    for stored in range(CONTEXT + 1, 71):
        lane.append(stored - 1)
        while len(lane) > kept + ceil(0.4 * (stored - CONTEXT)):
            del lane[kept - 3]
        if (stored - CONTEXT) % 4 == 0:
            assert drive.kept[stored][0] == lane
    assert list(drive.kept) == [*range(CONTEXT, 71, 4)]


def test_all_of_the_budget_does_nothing() -> None:
    assert ElasticCache(budget=1.0).open(runner()).onset(500) == NEVER
    assert SMALL.open(runner()).onset(3) == NEVER, "shorter than what always stays"
