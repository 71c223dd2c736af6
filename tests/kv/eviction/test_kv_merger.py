"""KVMerger: runs, pivots and Gaussian means."""

from __future__ import annotations

import numpy as np
import pytest

from redraft.core.sequence import NEVER
from redraft.errors import InvalidInput
from redraft.kv.eviction.kv_merger import KVMerger
from redraft.kv.eviction.merge import neighbours
from tests.kv.eviction import LANES, runner
from tests.kv.eviction.merging import SIZE, Decided, contents, decide, walk

CONTEXT = 80
SMALL = KVMerger(similar=0.8, recent=0.1, heavy=0.1, longest=6, count=True)


def sets(found: Decided, lane: int) -> list[list[int]]:
    """The runs of a lane and its protected slots, from the newest slot backwards."""
    method, mass, close = found.policy.method, found.sums[0, lane], neighbours(found.keys[lane])
    heavy = sorted(range(72), key=lambda j: mass[j], reverse=True)[:8]
    protected, made = {*range(72, 80), *heavy}, []
    for j in range(CONTEXT - 1, -1, -1):
        apart = not made or j in protected or made[-1][-1] in protected
        if apart or close[j] <= method.similar or len(made[-1]) == method.longest:
            made.append([])
        made[-1].append(j)
    return [run[::-1] for run in reversed(made)]


def test_each_run_becomes_a_gaussian_mean_at_its_pivot() -> None:
    found = decide(SMALL, CONTEXT, walk(CONTEXT, 1), walk(CONTEXT, 2))
    merged = found.kept.merged
    assert merged is not None
    for lane, slots in enumerate(found.kept.slots):
        made = sets(found, lane)
        assert sum(map(len, made)) == CONTEXT and max(map(len, made)) > 2
        pivots = [max(run, key=lambda j: found.sums[0, lane, j]) for run in made]
        assert slots.tolist() == pivots
        keys, values = contents(found, lane)
        for i, run in enumerate(made):
            gaps = np.linalg.norm(found.keys[lane, run] - found.keys[lane, pivots[i]], axis=-1)
            weights = np.exp(-(gaps**2) / (2 * (gaps.sum() / max(len(run) - 1, 1)) ** 2)) if len(run) > 1 else np.ones(1)
            weights /= weights.sum()
            assert keys[i] == pytest.approx(weights @ found.keys[lane, run], abs=1e-4)
            assert values[i] == pytest.approx(weights @ found.values[lane, run], abs=1e-4)
            assert len(run) > 1 or (keys[i] == found.keys[lane, run[0]]).all()
        tokens = np.ones(len(slots), int)
        tokens[merged.slots[merged.lanes == lane]] = merged.tokens[merged.lanes == lane]
        assert tokens.tolist() == list(map(len, made))


def test_slots_fall_with_the_border_and_none_are_merged_at_one() -> None:
    counts = []
    for similar in (0.99, 0.9, 0.5, -1.0):
        kept = decide(KVMerger(similar=similar), CONTEXT, walk(CONTEXT, 1), walk(CONTEXT, 2)).kept
        counts.append([len(slots) for slots in kept.slots])
    assert (np.diff(counts, axis=0) <= 0).all() and counts[0] != counts[-1]
    assert KVMerger(similar=1).open(runner()).onset(500) == NEVER


def test_equal_keys_stay_and_values_are_averaged() -> None:
    keys, values = np.ones((LANES, CONTEXT, SIZE), np.float32), walk(CONTEXT, 2)
    found = decide(KVMerger(recent=0, heavy=0, longest=20), CONTEXT, keys, values)
    for lane in range(LANES):
        merged = contents(found, lane)
        assert abs(merged[0] - 1).max() < 1e-6 and len(merged[0]) == 4
        assert merged[1] == pytest.approx(values[lane].reshape(4, 20, SIZE).mean(1), abs=1e-4)


def test_the_pivot_alone_drops_the_others() -> None:
    keys, values = walk(CONTEXT, 1), walk(CONTEXT, 2)
    alone, mean = (decide(KVMerger(weights=weights), CONTEXT, keys, values).kept for weights in ("pivot", "mean"))
    assert alone.merged is None and mean.merged is not None
    assert all(map(np.array_equal, alone.slots, mean.slots)) and (mean.merged.tokens == 1).all()


def test_unknown_weights_are_named() -> None:
    with pytest.raises(InvalidInput, match=r"kvmerger:weights='sum': must be gaussian, mean, pivot"):
        KVMerger(weights="sum")
