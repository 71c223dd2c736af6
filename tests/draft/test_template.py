"""The best tree for known chances against brute force, and rates that follow what was right."""

from __future__ import annotations

import itertools
import math
from random import Random

import pytest

from redraft.core.tree import EMPTY
from redraft.draft.template import CERTAINTY, FORGET, Growth, HitRates, Offer

Path = tuple[int, ...]


def grown(values: list[list[float]], rows: int, depth: int = 9) -> Growth:
    """The tokens of rank r are r."""
    growth = Growth(rows, depth)
    for level in values[:depth]:
        offer = Offer(range(len(level)), level)
        for node in growth.open(level[0]):
            growth.extend(node, offer, level, level)
    return growth


def paths(growth: Growth) -> list[Path]:
    tree = growth.tree()
    return [tuple(tree.tokens[tree.path_to(node)].tolist()) for node in range(len(tree))]


def best(values: list[list[float]], rows: int) -> float:
    """The largest sum of path products over all sets of `rows` paths that hold the prefixes of their paths."""
    every: list[Path] = [path for n in range(1, len(values) + 1) for path in itertools.product(*(range(len(v)) for v in values[:n]))]
    worth = {path: math.prod(values[d][rank] for d, rank in enumerate(path)) for path in every}
    found = 0.0
    for some in itertools.combinations(every, min(rows, len(every))):
        held = set(some)
        if all(len(path) == 1 or path[:-1] in held for path in some):
            found = max(found, sum(worth[path] for path in some))
    return found


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seed", range(6))
def test_no_tree_of_as_many_nodes_is_better(rows: int, seed: int) -> None:
    dice = Random(seed)
    values = [sorted((dice.random() ** 2 for _ in range(ranks)), reverse=True) for ranks in ((3, 2, 2), (2, 2, 1), (1, 2, 3))[seed % 3]]
    found = paths(growth := grown(values, rows))
    assert sum(math.prod(values[d][rank] for d, rank in enumerate(path)) for path in found) == pytest.approx(best(values, rows))
    assert len(found) == min(rows, len(set(found))) and all(len(path) == 1 or path[:-1] in found for path in found)
    growth.tree().check(vocab=9, rows=rows, depth=3)


def test_ties_keep_parents_and_earlier_siblings() -> None:
    assert paths(grown([[1.0, 1.0, 1.0]] * 3, 5)) == [(0,), (1,), (2,), (0, 0), (0, 1)]


def test_what_cannot_be_right_is_no_node() -> None:
    assert grown([[0.0, 0.0]], 4).tree() is EMPTY
    assert paths(grown([[0.5, 0.0], [0.5]], 4)) == [(0,), (0, 0)]


def test_the_depth_is_a_bound_and_scores_are_products() -> None:
    growth = grown([[0.5, 0.25], [0.5], [0.5]], 8, depth=2)
    scores = growth.tree().scores
    assert scores is not None
    assert dict(zip(paths(growth), scores.tolist(), strict=True)) == {(0,): 0.5, (1,): 0.25, (0, 0): 0.25, (1, 0): 0.125}


# ---- rates


def learnt(rates: HitRates, ranks: list[int | None], times: int = 1) -> None:
    """Steps that were right at these ranks, None: at none."""
    for _ in range(times):
        growth = grown([[0.5, 0.4, 0.3]] * 3, 39)
        rates.learn(growth, [9 if rank is None else rank for rank in ranks])


def test_rates_become_the_shares_of_each_rank() -> None:
    rates = HitRates(3, 3)
    learnt(rates, [0, 1], 300)
    learnt(rates, [0, 0], 300)
    learnt(rates, [1], 200)
    learnt(rates, [None], 200)
    assert rates.rates(0) == pytest.approx([0.6, 0.2, 0.0], abs=0.02)
    assert rates.tries == [CERTAINTY + 1000, CERTAINTY + 600, CERTAINTY]
    assert rates.rates(1) == pytest.approx([0.5, 0.5, 0.0], abs=0.02)
    learnt(rates, [0, 1], 600)
    assert rates.rates(1)[0] == rates.rates(1)[1] == pytest.approx(0.25, abs=0.02), "they fall, so that the first is never left out"


def test_depths_are_conditional_on_the_path_above() -> None:
    """A token that was drafted nowhere ends what a step teaches, unless offers do not depend on the path."""
    rates = HitRates(3, 3)
    growth = grown([[0.5, 0.1], [0.5]], 1)
    rates.learn(growth, [1, 0])
    assert rates.tries == [CERTAINTY + 1, CERTAINTY, CERTAINTY]
    growth.every = [Offer([0, 1], [0.5, 0.1]), Offer([0], [0.5])]
    rates.learn(growth, [1, 0, 5])
    assert rates.tries == [CERTAINTY + 2, CERTAINTY + 1, CERTAINTY]


def test_promises_are_corrected() -> None:
    rates = HitRates(1, 3)
    learnt(rates, [0], 300)
    learnt(rates, [None], 300)
    assert rates.factor(0) == pytest.approx(0.5 / 1.2, abs=0.02)


def test_old_steps_are_forgotten() -> None:
    rates = HitRates(1, 3)
    learnt(rates, [None], 4 * int(FORGET))
    learnt(rates, [0], 4 * int(FORGET))
    assert rates.rates(0)[0] > 0.9 and rates.tries[0] <= FORGET


def test_a_snapshot_is_a_copy() -> None:
    rates = HitRates(2, 3, [[0.9, 0.05], [0.5]])
    assert rates.rates(0) == pytest.approx([0.9, 0.05, 0.0])
    before, shown = rates.snapshot(), [rates.rates(0), rates.rates(1)]
    learnt(rates, [2, 2], 50)
    assert [rates.rates(0), rates.rates(1)] != shown
    rates.restore(before)
    learnt(rates, [2, 2], 50)
    rates.restore(before)
    assert [rates.rates(0), rates.rates(1)] == shown
