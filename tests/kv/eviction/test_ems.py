"""EMS: scores, the three kinds of slots, and means."""

from __future__ import annotations

import numpy as np
import pytest

from redraft.errors import InvalidInput
from redraft.kv.eviction.ems import EMS
from redraft.kv.eviction.merge import cosines, evicted
from redraft.kv.eviction.snap_kv import SnapKV
from tests.kv.eviction import LANES, Drive, given, grouped, runner
from tests.kv.eviction.merging import SIZE, contents, decide, walk

CONTEXT = 60
SMALL = EMS(budget=12, window=4, similar=0.6, sparse=0.05)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_local_score_alone_is_that_of_snapkv(seed: int) -> None:
    found = []
    for method in (EMS(budget=12, window=4, similar=1, score="local"), SnapKV(budget=12, window=4, pool=1, sinks=0)):
        policy = method.open(runner())
        found.append(Drive(policy, context=30).run(grouped(policy, 30, seed, False, 30)).kept[30])
    assert found[0] == found[1]


def test_the_global_score_is_the_mean_over_the_rows_that_see_a_slot() -> None:
    policy = EMS(budget=12, window=4, similar=1, score="global").open(runner())
    drive = Drive(policy, context=30).run(grouped(policy, 50, 3, True, 30))
    assert drive.kept.keys() == {30, *range(34, 50 + 1, 4)} - {stored for stored in range(34, 51, 4) if stored > drive.seq.stored}
    for lane, kept in enumerate(drive.kept[30]):
        score = {j: sum(given("mass", lane, row, j) for row in range(j, 30)) / (30 - j) for j in range(26)}
        assert kept == sorted([*sorted(score, key=lambda j: (score[j], j), reverse=True)[:8], 26, 27, 28, 29])
    assert all(len(lane) == 12 for lanes in drive.kept.values() for lane in lanes)


def test_both_scores_have_one_mean_before_the_larger_counts() -> None:
    policy = SMALL.open(runner())
    every, last, rows = np.arange(1.0, 11), np.array([9.0, 1, 1, 1, 1, 1, 1, 1, 1, 1]), np.full(10, 2, np.int32)
    found = policy.scores(every, last, rows)
    assert found[1:].tolist() == np.maximum(every / 2, 1.75 / (14 / 6))[1:].tolist() and found[0] == pytest.approx(9 * 1.75 / (14 / 6))


def test_slots_join_the_most_similar_centre_or_vanish() -> None:
    found = decide(SMALL, CONTEXT, walk(CONTEXT, 1), walk(CONTEXT, 2))
    lost = 0
    for lane, slots in enumerate(found.kept.slots):
        assert len(slots) == 12 and slots[-4:].tolist() == [56, 57, 58, 59]
        scores = found.policy.scores(found.sums[0, lane], found.sums[1, lane], CONTEXT - np.arange(CONTEXT))
        gone, centres = evicted(slots, CONTEXT), slots[:-4]
        gone = gone[np.argsort(scores[gone], kind="stable")]
        gone = gone[np.cumsum(scores[gone]) > 0.05 * scores[:-4].sum()]
        alike = np.ones((len(gone), len(centres)))
        for given_ in (found.keys[lane], found.values[lane]):
            alike *= cosines(given_[gone], given_[centres]).clip(0)
        for i, slot in enumerate(centres.tolist()):
            mine = sorted(int(gone[j]) for j in range(len(gone)) if alike[j].argmax() == i and alike[j].max() > 0.6)
            for part, given_ in zip(contents(found, lane), (found.keys[lane], found.values[lane]), strict=True):
                assert part[i] == pytest.approx(given_[[slot, *mine]].mean(0), abs=1e-5)
                assert mine or (part[i] == given_[slot]).all(), "without members nothing changes"
        lost += int((alike.max(1) <= 0.6).sum())
    assert lost


def test_bounds_of_similarity_drop_all_or_merge_all() -> None:
    keys, values = walk(CONTEXT, 1), walk(CONTEXT, 2)
    none = decide(EMS(budget=12, window=4, similar=1), CONTEXT, keys, values).kept
    every = decide(EMS(budget=12, window=4, similar=-1, sparse=0), CONTEXT, keys, values).kept
    assert none.merged is None and [slots.tolist() for slots in none.slots] == [slots.tolist() for slots in every.slots]
    ones = np.ones((LANES, CONTEXT, SIZE), np.float32)
    one = decide(EMS(budget=12, window=4, similar=0.5, sparse=0), CONTEXT, ones, ones).kept.merged
    assert one is not None and (one.keys == 1).all(), "merging equals changes nothing"


def test_a_budget_of_all_does_nothing() -> None:
    assert EMS(budget=4096.0).open(runner()).onset(300).at == 4096 + 32


def test_an_unknown_score_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"ems:score='mean': must be both, global, local"):
        EMS(score="mean")
