"""The regression learns how often evidence comes true, and its prior counts."""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from redraft.draft.acceptance import DEPTHS, Acceptance


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
