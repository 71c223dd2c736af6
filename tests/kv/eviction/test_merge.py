"""Matchers and means of merged slots, against plain loops."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from redraft.kv.eviction.merge import contents, cosines, evicted, joins, means, nearest, neighbours, runs
from redraft.kv.slots import Held

SOME = st.sets(st.integers(0, 29), min_size=1, max_size=29).map(lambda found: np.array(sorted(found), np.int32))


@given(SOME)
def test_each_evicted_slot_is_matched_to_the_nearest_kept_one(kept: np.ndarray) -> None:
    gone = evicted(kept, 30)
    assert sorted([*kept, *gone]) == list(range(30))
    for slot, index in zip(gone, nearest(kept, gone), strict=True):
        assert index == min(range(len(kept)), key=lambda i: (abs(int(kept[i]) - int(slot)), kept[i]))


@given(SOME, st.integers(0, 99))
def test_weights_sum_to_one_and_each_slot_is_in_one_mean(kept: np.ndarray, seed: int) -> None:
    dice, gone = np.random.default_rng(seed), evicted(kept, 30)
    found = joins(kept, gone, dice.integers(0, len(kept), len(gone)), 2.0, dice.random(len(gone)) + 0.1)
    assert sorted(found.src) == sorted([*gone, *np.unique(found.dst)]), "each evicted slot once, and each slot that is joined once"
    for slot in np.unique(found.dst):
        mine = found.dst == slot
        assert found.src[mine][0] == slot and abs(found.weights[mine].sum() - 1) < 1e-6


def test_cosines_of_zeros_are_zero_and_of_multiples_one() -> None:
    x = np.array([[0, 0], [1, 2], [2, 4], [-1, -2], [2, -1]], np.float32)
    assert cosines(x, x[1:2])[:, 0] == pytest.approx([0, 1, 1, -1, 0]) and neighbours(x) == pytest.approx([0, 1, -1, 0])


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 9))
def test_runs_are_filled_from_the_newest_slot(joined: list[bool], most: int) -> None:
    found = runs(joined, most).tolist()
    assert len(found) == len(joined) + 1 and found[0] == 0
    for i, same in enumerate(joined):
        assert found[i + 1] - found[i] in (0, 1) and (same or found[i + 1] > found[i])
        full = found.count(found[i + 1]) == most
        assert not same or found[i + 1] == found[i] or full, "a run ends only where it must"


@settings(deadline=None)
@given(SOME, st.integers(0, 99), st.booleans())
def test_contents_are_means(kept: np.ndarray, seed: int, count: bool) -> None:
    dice, gone = np.random.default_rng(seed), evicted(kept, 30)
    keys, values = dice.standard_normal((2, 2, 1, 30, 4)).astype(np.float32)
    mean = joins(kept, gone, dice.integers(0, len(kept), len(gone)))
    nothing = means(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0))
    found = contents([kept, kept], [nothing, mean], Held(list, lambda lane: (keys[lane], values[lane])), count)
    assert found is not None and set(found.lanes) == {1}
    for at, key, value, tokens in zip(found.slots, found.keys, found.values, found.tokens, strict=True):
        expected = np.zeros((2, 4), np.float32)
        for dst, src, weight in zip(*mean, strict=True):
            if dst == kept[at]:
                expected += weight * np.stack([keys[1, 0, src], values[1, 0, src]])
        assert key == pytest.approx(expected[0], abs=1e-6) and value == pytest.approx(expected[1], abs=1e-6)
        assert tokens == ((mean.dst == kept[at]).sum() if count else 1)
    assert contents([kept], [nothing], Held(list, lambda lane: (keys[lane], values[lane]))) is None
