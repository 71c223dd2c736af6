"""The regression learns how often evidence comes true, and its prior counts."""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from redraft.draft.acceptance import DEPTHS, Acceptance
from redraft.draft.source import Trees


def sources(*buckets: int) -> list[Any]:
    return [SimpleNamespace(buckets=n) for n in buckets]


def chance(model: Acceptance, depth: int, asked: int, agreed: int, *features: int) -> float:
    ((_, found, *_),) = model.candidates(depth, asked, {7: [agreed, *features]})
    return found


def taught(model: Acceptance, depth: int, asked: int, agreed: int, *features: int, came: bool) -> None:
    model.learn(depth, model.candidates(depth, asked, {7: [agreed, *features]}), 7 if came else 8)


def test_it_learns_the_frequency_of_each_kind_of_evidence() -> None:
    model, rng = Acceptance(["a", "b"], sources(2, 1), {}), random.Random(3)
    a, b = model.first
    truth = {(0b01, a): 0.9, (0b01, a + 1): 0.1, (0b11, a, b): 0.97}
    for _ in range(20000):
        (agreed, *features), often = rng.choice(list(truth.items()))
        taught(model, 1, 0b11, agreed, *features, came=rng.random() < often)
    for (agreed, *features), often in truth.items():
        assert chance(model, 1, 0b11, agreed, *features) == pytest.approx(often, abs=0.06)


def test_features_are_distinct_and_deep_nodes_share_one() -> None:
    model = Acceptance(["a", "b"], sources(3, 2), {})
    assert model.first == [DEPTHS + 16, DEPTHS + 19] and len(model.weights) == DEPTHS + 21
    model.weights[:] = array("d", [2.0 ** (i - 25) for i in range(len(model.weights))])
    seen = {chance(model, depth, asked, agreed) for depth in (1, DEPTHS) for asked in range(4) for agreed in range(4)}
    assert len(seen) == 32 and chance(model, DEPTHS, 1, 1) == chance(model, DEPTHS + 9, 1, 1)


def test_a_prior_is_written_read_and_kept_for_other_sets_of_drafters() -> None:
    model, rng = Acceptance(["a", "b"], sources(2, 1), {}), random.Random(1)
    for _ in range(500):
        taught(model, 2, 0b01, 0b01, model.first[0] + 1, came=rng.random() < 0.8)
    prior = model.dump()
    again = Acceptance(["b", "a"], sources(1, 2), prior)
    before = chance(model, 2, 0b01, 0b01, model.first[0] + 1)
    assert before > 0.7 and chance(again, 2, 0b10, 0b10, again.first[1] + 1) == pytest.approx(before, abs=0.01)
    alone = Acceptance(["a", "c"], sources(5, 4), prior)  # another version of a with more buckets: its weights do not fit
    assert alone.weights[alone.first[0] :].tolist() == [0.0] * 9
    state = model.snapshot()
    taught(model, 1, 1, 1, model.first[0], came=True)
    assert model.snapshot() != state
    model.restore(state)
    assert model.snapshot() == state


def test_a_drafter_that_the_prior_does_not_know_changes_nothing_for_the_others() -> None:
    prior = {"sets": {"a b|a": -1.0, "a b|a b": 0.75, "b|b": 0.5}, "buckets": {"a": [0.25], "b": [0.5, -0.5]}}
    new = Acceptance(["a", "b", "c"], sources(1, 2, 1), prior)
    old = Acceptance(["a", "b"], sources(1, 2), prior)
    for asked, agreed in [(3, 1), (3, 3), (2, 2)]:
        (before,), (after,) = (one.candidates(1, asked, {9: [agreed, one.first[0]]}) for one in (old, new))
        (beside,) = new.candidates(1, asked | 4, {9: [agreed | 4, new.first[0]]})
        assert before[1] == after[1] == beside[1] != 0.5
    assert new.counts[8 + 3 * 8 + 1] > new.counts[8 + 7 * 8 + 5] == 0, "what is known without it is trusted less"


def test_scores_of_trees_come_true_until_more_is_known() -> None:
    trees = Trees(None)  # type: ignore[arg-type]
    model = Acceptance(["head"], [trees], {"depth": [-0.9] * 8})
    for bucket in range(8):
        ((_, chance, _, _),) = model.candidates(1, 1, {5: [1, model.first[0] + bucket]})
        assert chance == pytest.approx((bucket + 0.5) / 8)
