"""PrefixKV against a plain simulation of its steps."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
from hypothesis import given as drawn
from hypothesis import settings

from redraft.core.sequence import Lanes
from redraft.kv.eviction.parts import EqualMass, Mass, Selector
from redraft.kv.eviction.prefix_kv import PrefixKV
from tests.kv.eviction import HEADS, LAYERS, Drive, given, grouped, runner

SMALL = PrefixKV(budget=14, sinks=2, recent=3)
CONTEXT = 40


def opened(method: PrefixKV = SMALL) -> Any:
    return method.open(runner())


def plain(context: int, kept: int) -> list[list[int]]:
    """By bisection of the level, slot by slot."""
    layers = []
    for layer in range(LAYERS):
        heads = [layer * HEADS + head for head in range(HEADS)]
        mass = {j: sum(given("mass", i, row, j) for i in heads for row in range(j, context)) / HEADS for j in range(2, context - 3)}
        order = sorted(mass, key=lambda j: (mass[j], j), reverse=True)
        layers.append((order, [mass[j] for j in order]))
    free = LAYERS * (kept - 5)
    sizes = [0] * LAYERS
    while sum(sizes) < free:  # the next slot is that before which the least share is held
        level = [sum(mass[:size]) / sum(mass) for (_, mass), size in zip(layers, sizes, strict=True)]
        sizes[int(np.argmin(level))] += 1
    return [sorted([0, 1, *order[:size], *range(context - 3, context)]) for (order, _), size in zip(layers, sizes, strict=True)]


@settings(max_examples=10, deadline=None)
@drawn(st.integers(0, 1 << 20), st.booleans())
def test_one_decision_as_the_plain_simulation(seed: int, drafting: bool) -> None:
    policy = opened()
    assert policy.lanes is Lanes.PER_LAYER
    drive = Drive(policy, context=CONTEXT).run(grouped(policy, 70, seed, drafting, CONTEXT))
    assert drive.kept == {CONTEXT: plain(CONTEXT, 14)}


def shares(mass: np.ndarray, kept: int, floor: int = 0) -> np.ndarray:
    lengths = np.full(len(mass), mass.shape[1])
    keys = Mass(1).keys(mass[None], lengths)
    return EqualMass(floor, len(mass)).shares(kept, keys, Selector(0, floor).ranks(keys, lengths), lengths)


def test_equal_profiles_get_equal_budgets_and_spread_ones_more() -> None:
    one = np.arange(1.0, 21)
    assert shares(np.stack([one, 3 * one, one]), 8).tolist() == [8, 8, 8]
    sharp = np.array([100.0, *[0.1] * 19])
    assert shares(np.stack([sharp, np.ones(20)]), 8).tolist() == [1, 15]


@drawn(st.integers(0, 1 << 20), st.integers(1, 19))
def test_budgets_grow_together_and_fill_the_total(seed: int, kept: int) -> None:
    mass = np.random.default_rng(seed).exponential(1, (3, 20)) ** 3
    less, more = shares(mass, kept), shares(mass, kept + 1)
    assert less.sum() == 3 * kept and more.sum() == 3 * (kept + 1) and (less <= more).all() and (more <= 20).all()
