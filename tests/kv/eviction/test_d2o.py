"""D2O: budgets of layers, thresholds and means; without both it is H2O."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given as drawn

from redraft.kv.eviction.d2o import D2O, whole
from redraft.kv.eviction.h2o import H2O
from redraft.kv.eviction.merge import cosines, evicted
from tests.kv.eviction import HEADS, LANES, LAYERS, Drive, grouped, runner
from tests.kv.eviction.merging import SIZE, contents, decide, walk

CONTEXT = 60
SMALL = D2O(budget=0.4, sinks=2, drop=8)


def test_without_merging_and_with_even_budgets_it_is_h2o() -> None:
    both = []
    for method in (D2O(budget=20, sinks=0, drop=8, adaptive=False, merge=False), H2O(budget=20, drop=8)):
        policy = method.open(runner())
        both.append(Drive(policy, context=40).run(grouped(policy, 70, 1, True, 40)).kept)
    assert both[0] == both[1] and len(both[0]) > 3


def test_budgets_fall_with_the_variance_and_fill_the_total() -> None:
    found = decide(SMALL, CONTEXT, walk(CONTEXT, 1), walk(CONTEXT, 2))
    lengths = np.array([len(slots) for slots in found.kept.slots])
    assert lengths.sum() == LANES * 24 and (lengths.reshape(LAYERS, HEADS) == lengths[::HEADS, None]).all()
    spread = found.sums[0].var(-1).reshape(LAYERS, HEADS).mean(1)
    assert (np.argsort(spread) == np.argsort(-lengths[::HEADS])).all() and len(set(lengths.tolist())) > 1
    assert lengths.max() <= found.policy.onset(CONTEXT).longest


def test_budgets_stay_and_the_number_of_slots_too() -> None:
    policy = D2O(budget=20, sinks=1, drop=8, merge=False).open(runner())
    drive = Drive(policy, context=40).run(grouped(policy, 90, 2, True, 40))
    lengths = {tuple(map(len, lanes)) for lanes in drive.kept.values()}
    assert len(lengths) == 1 and len(drive.kept) > 4 and drive.longest <= max(40, policy.onset(40).longest)


def test_similar_slots_join_and_others_are_lost() -> None:
    found = decide(SMALL, CONTEXT, walk(CONTEXT, 1), walk(CONTEXT, 2))
    for lane, slots in enumerate(found.kept.slots):
        keys, gone = found.keys[lane], evicted(slots, CONTEXT)
        alike = cosines(keys[gone], keys[slots])
        near = alike.max(1) >= alike.max(1).mean(dtype=np.float64)
        assert near.any() and not near.all()
        for i, slot in enumerate(slots.tolist()):
            mine = [(float(np.exp(alike[j, i])), int(gone[j])) for j in np.flatnonzero(near) if alike[j].argmax() == i]
            weights = np.array([np.e, *(weight for weight, _ in mine)])
            for part, given in zip(contents(found, lane), (keys, found.values[lane]), strict=True):
                expected = (weights[:, None] * given[[slot, *(j for _, j in mine)]]).sum(0) / weights.sum()
                assert part[i] == pytest.approx(expected, abs=1e-5)


def test_merging_equals_changes_nothing() -> None:
    one = np.broadcast_to(np.float32(0.37), (LANES, CONTEXT, SIZE)).copy()
    merged = decide(SMALL, CONTEXT, one, one).kept.merged
    assert merged is not None and (merged.keys == one[0, 0]).all()


def test_a_threshold_follows_later_means() -> None:
    found = decide(SMALL, CONTEXT, walk(CONTEXT, 1), walk(CONTEXT, 2))
    first = found.seq.state[found.policy].thresholds.copy()
    child = found.policy.fork(found.seq.state[found.policy], found.seq)
    found.seq.state[found.policy].thresholds[:] = 0
    assert (child.thresholds == first).all() and np.isfinite(first).all()


@drawn(st.lists(st.floats(0.3, 1), min_size=1, max_size=8), st.data())
def test_whole_shares_have_the_sum_and_the_bounds(parts: list[float], data: st.DataObject) -> None:
    least, most = data.draw(st.integers(0, 5)), data.draw(st.integers(5, 30))
    total = data.draw(st.integers(least * len(parts), most * len(parts)))
    found = whole(np.array(parts), total, least, most)
    assert found.sum() == total and (found >= least).all() and (found <= most).all()
